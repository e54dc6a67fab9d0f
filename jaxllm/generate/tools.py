"""Tools that a model may call: text in, text out, never an exception. None has side effects here.

The calculator is a calculator: a grammar of numbers, + - * / ** and parentheses over exact rationals, read by hand. It is no
sandbox for Python and never becomes one; that is `sandbox.runner`, which `python` below puts behind the same interface.
"""

from __future__ import annotations

import decimal
import re
from collections.abc import Callable
from fractions import Fraction

from jaxllm.generate.sandbox.runner import CodeRunner

LONGEST = 400  # characters of an expression
DEEPEST = 50  # open parentheses and signs
EXPONENT = 1000
BITS = 4096  # of a numerator or denominator
DIGITS = 12  # significant ones of what is no short decimal
TOKEN = re.compile(r"\s*(?:(?P<number>[0-9]+(?:\.[0-9]*)?|\.[0-9]+)|(?P<sign>\*\*|[-+*/()])|(?P<other>\S))")

Tool = Callable[[str], str]


def calculator(text: str) -> str:
    """The value of an expression as text: "7/4" is 1.75, "1/3" is 0.333333333333; "error: ..." when there is none."""
    try:
        return shown(calculate(text))
    except ValueError as error:
        return f"error: {error}"


def python(runner: CodeRunner) -> Tool:
    """A tool that runs a program and gives what it prints, or the end of its error: untrusted text, like the model's own."""

    def tool(source: str) -> str:
        outcome = runner.program(source, "")
        if outcome.kind != "ended":
            return f"error: {outcome.reason}"
        return outcome.stdout if outcome.code == 0 else f"{outcome.stdout}error: {outcome.stderr.strip()[-1000:]}"

    return tool


def calculate(text: str) -> Fraction:
    """The exact value of an expression. ValueError: what is no expression, division by zero, too long, too large.

    sum: product ([+-] product)*; product: signed ([*/] signed)*; signed: [+-] signed, or power; power: atom [** signed]; as in
    Python, -2**2 is -4 and 2**3**2 is 512. Sizes are checked before a power is taken: 9**9**9 costs nothing.
    """
    if len(text) > LONGEST:
        raise ValueError(f"over {LONGEST} characters")
    tokens = _tokens(text)[::-1]
    value = _sum(tokens, 0)
    if tokens:
        raise ValueError(f"{tokens[-1]!r} was not expected")
    return value


def shown(value: Fraction) -> str:
    """Whole numbers with all their digits, others as decimals rounded to 12 significant digits."""
    if value.denominator == 1:
        return str(value.numerator)
    context = decimal.Context(prec=DIGITS)
    return str(context.divide(decimal.Decimal(value.numerator), decimal.Decimal(value.denominator)).normalize(context))


# ---- the grammar; tokens are taken from the end of a reversed list


def _tokens(text: str) -> list[str]:
    tokens, at = [], 0
    text = text.rstrip()
    while at < len(text):
        match = TOKEN.match(text, at)
        if match["other"]:
            raise ValueError(f"{match['other']!r} is no part of a calculation: numbers, + - * / ** and parentheses")
        tokens.append(match["number"] or match["sign"])
        at = match.end()
    return tokens


def _next(tokens: list[str], *signs: str) -> str | None:
    """The next token, taken, when it is one of the signs."""
    return tokens.pop() if tokens and tokens[-1] in signs else None


def _sum(tokens: list[str], depth: int) -> Fraction:
    value = _product(tokens, depth)
    while sign := _next(tokens, "+", "-"):
        right = _product(tokens, depth)
        value = _small(value + right if sign == "+" else value - right)
    return value


def _product(tokens: list[str], depth: int) -> Fraction:
    value = _signed(tokens, depth)
    while sign := _next(tokens, "*", "/"):
        right = _signed(tokens, depth)
        if sign == "/" and right == 0:
            raise ValueError("division by zero")
        value = _small(value * right if sign == "*" else value / right)
    return value


def _signed(tokens: list[str], depth: int) -> Fraction:
    if depth > DEEPEST:
        raise ValueError(f"over {DEEPEST} parentheses and signs inside one another")
    if sign := _next(tokens, "+", "-"):
        value = _signed(tokens, depth + 1)
        return -value if sign == "-" else value
    base = _atom(tokens, depth)
    return _power(base, _signed(tokens, depth + 1)) if _next(tokens, "**") else base


def _atom(tokens: list[str], depth: int) -> Fraction:
    if _next(tokens, "("):
        value = _sum(tokens, depth + 1)
        if not _next(tokens, ")"):
            raise ValueError("a parenthesis is not closed")
        return value
    if not tokens or not tokens[-1].strip(".").replace(".", "").isdigit():
        raise ValueError(f"a number was expected, not {tokens[-1] if tokens else 'the end'!r}")
    return _small(Fraction(tokens.pop()))


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ValueError("only whole exponents are taken")
    if abs(exponent) > EXPONENT or _bits(base) * abs(exponent) > BITS:
        raise ValueError(f"too large: exponents go to {EXPONENT}, numbers to {BITS} bits")
    if base == 0 and exponent < 0:
        raise ValueError("division by zero")
    return base ** int(exponent)


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _small(value: Fraction) -> Fraction:
    if _bits(value) > BITS:
        raise ValueError(f"too large: numbers go to {BITS} bits")
    return value
