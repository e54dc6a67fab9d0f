"""The calculator against Python's own arithmetic, what it refuses and how fast; the tool that runs programs."""

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.generate import tools
from jaxllm.generate.sandbox.runner import CodeRunner, Outcome

leaf = st.integers(0, 99).map(str) | st.sampled_from(["0.5", ".25", "3.", "12.75"])


def grown(inner):
    signs = st.sampled_from(["+", "-", "*", "/"])
    pairs = st.tuples(inner, signs, inner).map(lambda t: f"{t[0]} {t[1]} {t[2]}")
    return (
        pairs
        | inner.map(lambda e: f"({e})")
        | inner.map(lambda e: f"-{e}")
        | st.tuples(leaf, st.sampled_from("0123")).map("**".join)
    )


@given(st.recursive(leaf, grown, max_leaves=12))
@settings(max_examples=300, deadline=None)
def test_it_is_pythons_arithmetic_on_rationals(expression):
    """Python's parser is the oracle here, on text that this test wrote: numbers as Fractions."""
    text = tools.TOKEN.sub(lambda m: f" Fraction('{m['number']}')" if m["number"] else m[0], expression)
    try:
        want = eval(text, {"Fraction": Fraction})  # noqa: S307
    except ZeroDivisionError:
        assert tools.calculator(expression) == "error: division by zero"
        return
    assert tools.calculate(expression) == want


@pytest.mark.parametrize(
    "expression,want",
    [
        ("2+2", "4"), ("-2**2", "-4"), ("2**3**2", "512"), ("2**-1", "0.5"), ("7/4", "1.75"), ("1/3", "0.333333333333"),
        ("2/3*3", "2"), ("0.1+0.2", "0.3"), (" ( 1 + 2 ) * 3 ", "9"), ("--3", "3"), ("10**-9 / 3", "3.33333333333E-10"),
        ("2**100", str(2**100)), ("0**0", "1"), ("(1/2)**3", "0.125"),
    ],
)  # fmt: skip
def test_values(expression, want):
    assert tools.calculator(expression) == want


@pytest.mark.parametrize(
    "expression,words",
    [
        ("9**9**9", "too large"), ("9**(9**9)", "too large"), ("2**1001", "too large"), ("(10**300)**300", "too large"),
        ("1/0", "division by zero"), ("0**-1", "division by zero"), ("2**0.5", "only whole exponents"), ("", "the end"),
        ("2+", "the end"), ("2 3", "'3' was not expected"), ("(2", "not closed"), ("2)", "')' was not expected"),
        ("()", "not ')'"),
        ("__import__('os')", "'_' is no part"), ("x", "'x' is no part"), ("1e999", "'e' is no part"), ("2//3", "not '/'"),
        ("1;2", "';' is no part"), ("2*3" * 200, "over 400 characters"), ("(" * 200 + "1" + ")" * 199, "over 50 parentheses"),
        ("-" * 300 + "1", "over 50 parentheses and signs"), ("9" * 399, ""), ("\u0661+1", "is no part"), (".", "'.' is no part"),
        ("1.2.3", "was not expected"), ("10**400*" * 40 + "1", "too large"), ("lambda: 0", "'l' is no part"),
    ],
)  # fmt: skip
def test_what_is_refused_is_refused_at_once(expression, words):
    begun = time.perf_counter()
    found = tools.calculator(expression)
    assert time.perf_counter() - begun < 0.1
    assert (found.startswith("error: ") and words in found) if words else found == expression


@given(st.text(alphabet="0123456789.+-*/() e\n_", max_size=500) | st.text(max_size=50))
@settings(max_examples=300, deadline=500)
def test_any_text_has_an_answer(text):
    found = tools.calculator(text)
    assert found.startswith("error: ") or Fraction(found) is not None  # a number, then


def test_programs_give_what_they_print():
    def program(source, stdin):
        kinds = {"good": ("ended", "3\n", "", 0, ""), "bad": ("ended", "1\n", "Traceback\nValueError: x\n", 1, "")}
        kind, out, err, code, reason = kinds.get(source, ("timeout", "", "", None, "took over 5 seconds"))
        return Outcome(kind, (), out, err, code, reason)

    tool = tools.python(CodeRunner("scripted", None, program))
    assert tool("good") == "3\n" and tool("slow") == "error: took over 5 seconds"
    assert tool("bad") == "1\nerror: Traceback\nValueError: x"
