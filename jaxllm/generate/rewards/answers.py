"""Answers as exact rationals, read without evaluating anything, and the rewards that compare them.

Bounded: only the last TAIL characters of a text are read, every pattern is linear, numbers longer than DIGITS characters or with
exponents beyond EXPONENT are refused (no number) rather than computed.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

TAIL = 20_000  # characters of a text that are read, from its end
DIGITS = 200
EXPONENT = 100
UNIT = 48  # characters that may follow a number as its unit

CURRENCY = r"[$€£¥₹]"
BODY = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
POWER = r"(?:[eE](?P<e>[+-]?[0-9]+)|[ ]?[x×*][ ]?10\^\{?(?P<ten>[+-]?[0-9]+)\}?)"
NUMBER = re.compile(
    rf"(?<![0-9.])(?P<sign>(?<![\w)])[+-])?{CURRENCY}?(?P<sign2>[+-])?"
    rf"(?:(?P<whole>[0-9]{{1,{DIGITS}}})[ ](?P<a>[0-9]++)[ ]?/[ ]?(?P<b>[0-9]++)(?![0-9.,]*[0-9])"
    rf"|(?P<top>{BODY}){POWER}?(?:[ ]?/[ ]?(?P<under>{BODY}))?)"
    r"(?:[ ]?(?P<percent>%|(?:percent|per cent)\b)|[ ]?(?P<scale>thousand|million|billion|trillion)\b)?",
    re.IGNORECASE,
)
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]{1,80})\}\s*\{([^{}]{1,80})\}|([0-9])([0-9]))")
WRAPPED = re.compile(r"\\(?:text|mathrm|mathbf|mbox|textbf)\s*\{([^{}]{0,200})\}")
LATEX = (
    ("{,}", ","), ("\\,", ""), ("\\!", ""), ("\\;", " "), ("\\ ", " "), ("\\$", "$"), ("\\%", "%"), ("\\left", ""),
    ("\\right", ""),
    ("\\times", "×"), ("\\cdot", "×"), ("^{\\circ}", ""), ("^\\circ", ""), ("\u2212", "-"), ("\u2013", "-"),
)  # fmt: skip
ANSWER_IS = re.compile(r"\banswer\s*(?:is\s*:?|[:=])\s*", re.IGNORECASE)


class Number(NamedTuple):
    """value: the number read, percent already divided by 100; percent: whether a percent sign stood there."""

    value: Fraction
    percent: bool = False


def parse(text: str) -> Number | None:
    """The number that a whole text is: "-1,234.5", "$3/4", "1 1/2", "50 %", "6.02e23", "5 million", "12 apples".

    None when it is none, or when another digit follows ("5 or 6"): a text of two numbers is no answer.
    """
    text = _plain(text).strip().strip("$ ")
    match = NUMBER.match(text)
    if match is None:
        return None
    rest = text[match.end() :].strip().rstrip(".!")
    unit = re.sub(r"\^\{?[23]\}?|[²³]", "", rest)  # cm^2 is a unit with a digit in it
    if len(unit) > UNIT or re.search(r"[0-9]|[-+*/=^<>]\s*$|^[-+*=^<>]", unit):
        return None
    return _value(match)


def numbers(text: str) -> Iterator[Number]:
    """Every number in a text, in order."""
    for match in NUMBER.finditer(_plain(text)):
        if (value := _value(match)) is not None:
            yield value


def marked_answer(text: str) -> str | None:
    """What a text marks as its answer: after the last `####`, else in the last \\boxed{...}, else after "the answer is"."""
    text = text[-TAIL:]
    if "####" in text:
        return text[text.rfind("####") + 4 :].strip().split("\n")[0].strip()
    if (boxed := _boxed(text)) is not None:
        return boxed.strip()
    ends = [match.end() for match in ANSWER_IS.finditer(text)]
    return text[ends[-1] :].split("\n")[0].strip() if ends else None


def final_answer(text: str) -> str | None:
    """The marked answer, and otherwise the last number as it is written; None when there is neither."""
    if (marked := marked_answer(text)) is not None:
        return marked
    found = [m for m in NUMBER.finditer(_plain(text)) if _value(m) is not None]
    return found[-1][0].strip() if found else None


def final_number(text: str) -> Number | None:
    """The number of the final answer: the whole marked answer when it is one, else the first number in it."""
    if (answer := final_answer(text)) is None:
        return None
    return parse(answer) or next(numbers(answer), None)


def numeric_match(prediction: str, gold: str) -> bool:
    """Whether the prediction's final number equals gold's, as rationals: no tolerance.

    Where only one of them has a percent sign it may be a unit: 50% matches 50 and 0.5. ValueError when gold is no number.
    """
    if (want := gold_number(gold)) is None:
        raise ValueError(f"the gold answer {gold[:60]!r} is no number")
    got = final_number(prediction)
    if got is None:
        return False
    if got.percent == want.percent:
        return got.value == want.value
    return want.value in (got.value, got.value * 100) or got.value == want.value * 100


def gold_number(gold: str) -> Number | None:
    """The number that a gold answer is, after its mark if it has one; stricter than final_number: all of it must be one."""
    marked = marked_answer(gold)
    return parse(gold if marked is None else marked)


def exact_match(prediction: str, gold: str) -> bool:
    """Whether the prediction, or what it marks as its answer, is the gold text up to case, blanks and a final full stop."""
    marked = marked_answer(prediction)
    return normalised(gold) in {normalised(prediction), *([normalised(marked)] if marked is not None else [])}


def normalised(text: str) -> str:
    """NFKC, case folded, blanks collapsed, without quotes around it or a full stop at its end."""
    text = " ".join(unicodedata.normalize("NFKC", text[-TAIL:]).casefold().split())
    return text.strip("\"'$ ").removesuffix(".").strip("\"'$ ")


# ---- reading


def _plain(text: str) -> str:
    """The text's end with LaTeX's spellings of numbers written plainly."""
    text = text[-TAIL:]
    if "\\" in text or "{,}" in text:
        text = WRAPPED.sub(r" \1", text)
        text = FRACTION.sub(lambda m: " " * _after_digit(m) + f"{m[1] or m[3]}/{m[2] or m[4]}", text)
    for old, new in LATEX:
        text = text.replace(old, new)
    return text


def _after_digit(match: re.Match) -> bool:
    """Whether a fraction follows a digit at once: 1\\frac{1}{2} is one and a half."""
    return match.start() > 0 and match.string[match.start() - 1].isdigit()


def _value(match: re.Match) -> Number | None:
    """The number of a match of NUMBER; None when it is too long, too large, or divided by zero."""
    if len(match[0]) > DIGITS:
        return None
    exponent = int((match["e"] or match["ten"] or "0")[:12])
    if abs(exponent) > EXPONENT:
        return None
    top, under = (_decimal(match[name]) for name in ("top", "under"))
    if match["whole"] is not None:
        top, under = Fraction(int(match["a"])), Fraction(int(match["b"]))
    if top is None or under == 0:
        return None
    value = top * Fraction(10) ** exponent / (1 if under is None else under)
    if match["whole"] is not None:
        value += int(match["whole"])
    value *= SCALES[match["scale"].lower()] if match["scale"] else 1
    negative = (match["sign"] or "").startswith("-") != ((match["sign2"] or "") == "-")
    percent = match["percent"] is not None
    return Number((-value if negative else value) / (100 if percent else 1), percent)


def _decimal(text: str | None) -> Fraction | None:
    return None if text is None else Fraction(text.replace(",", ""))


def _boxed(text: str) -> str | None:
    """The content of the last \\boxed{...}, braces balanced; None without one that closes."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed")
    for i in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[begin + 1 : i]
    return None
