"""The parser of answers: exact, without evaluation, bounded; and on all gold answers of GSM8K."""

import json
import time
from fractions import Fraction

import pytest

from jaxllm.generate.rewards import answers
from tests.conftest import shared_data

NUMBERS = {
    "72": 72, "-5": -5, "+7": 7, "\u22123": -3, "1,234": 1234, "1,234.5": Fraction(2469, 2),
    ".5": Fraction(1, 2), "0.1": Fraction(1, 10),
    "72.": 72, "$18": 18, "-$5": -5, "$-5": -5, "€1,200.50 per year": Fraction(2401, 2),
    "3/4": Fraction(3, 4), "-3/4": Fraction(-3, 4),
    "1 1/2": Fraction(3, 2), "4 1/2 hours": Fraction(9, 2), "50%": Fraction(1, 2), "12.5 percent": Fraction(1, 8), 
    "12 apples": 12,
    "7 dollars/hour": 7, "3 cm^2": 3, "6.02e23": Fraction(602) * 10**21, "1E-3": Fraction(1, 1000), 
    "2 × 10^3": 2000, "5 million": 5_000_000,
    "\\frac{3}{4}": Fraction(3, 4), "-\\dfrac12": Fraction(-1, 2), "1\\frac{1}{2}": Fraction(3, 2), 
    "\\$1{,}234": 1234, "$42$": 42,
    "\\text{7 apples}": 7, "2\\times 10^{3}": 2000,
}  # fmt: skip
NO_NUMBERS = [
    "", "x", "-", ".", "five", "5 or 6", "1,2,3", "1,23", "10:30", "3 * 4", "3 + 4", "12-5", "5 =", "1/2/3", 
    "3.5.1", "5/0", "1e101", "1e999999999",
    "9" * 201, "9" * 50_000, "__import__('os')", "2**1000", "nan", "inf", "1e", "0x10",
]  # fmt: skip


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers_are_read_exactly(text):
    assert answers.parse(text).value == NUMBERS[text]


@pytest.mark.parametrize("text", [t for t in NO_NUMBERS if t not in ("1e", "0x10")])
def test_what_is_no_number_is_none(text):
    assert answers.parse(text) is None


def test_letters_behind_a_number_are_its_unit():
    assert answers.parse("1e").value == 1 and answers.parse("0x").value == 0


@pytest.mark.parametrize(
    "text,answer",
    [
        ("2 + 2 = 4\n#### 1,080\nand 7 more", 1080),
        ("#### 3\n#### 4", 4),
        ("so \\boxed{\\frac{1}{2}} of 8", Fraction(1, 2)),
        ("The answer is 18 because 9*2=18.", 18),
        ("the answer is: $18.50.", Fraction(37, 2)),
        ("Answer: 7, no: the final answer is 9.", 9),
        ("he had 3, then 4", 4),
        ("10-5", 5),
        ("it is -5", -5),
        ("3+4=7", 7),
    ],
)
def test_the_final_answer_of_a_text(text, answer):
    assert answers.final_number(text).value == answer


@pytest.mark.parametrize("text", ["", "no number", "####", "\\boxed{}", "#### none"])
def test_a_text_without_an_answer(text):
    assert answers.final_number(text) is None
    assert not answers.numeric_match(text, "3")


@pytest.mark.parametrize(
    "prediction,gold,same",
    [
        ("#### 0.50", "1/2", True), ("#### 0.333", "1/3", False), ("#### 1000", "1,000", True), ("so 72 clips", "#### 72", True),
        ("50%", "50", True), ("50%", "0.5", True), ("0.5", "50%", True), 
        ("50", "50%", True), ("5", "50%", False), ("50%", "50%", True),
        ("0.1 + 0.2 is 0.3", "0.3", True), ("0.30000000000000004", "0.3", False),
    ],
)  # fmt: skip
def test_matches_are_exact(prediction, gold, same):
    assert answers.numeric_match(prediction, gold) is same


def test_a_gold_answer_that_is_no_number_is_said():
    with pytest.raises(ValueError, match="'blue' is no number"):
        answers.numeric_match("3", "blue")


def test_exact_match_of_texts():
    assert answers.exact_match("  Blue. ", "blue") and answers.exact_match("think ... the answer is Blue.", "blue")
    assert answers.exact_match("\\boxed{x y}", "X  Y") and answers.exact_match("#### ﬁne", "fine")
    assert not answers.exact_match("blue or red", "blue") and not answers.exact_match("", "blue")


EVIL = [
    "1," * 50_000, "9" * 100_000, "1 " * 50_000, "\\frac{" * 20_000, "\\boxed{" * 10_000 + "}" * 10_000, 
    "- " * 50_000, "1/" * 50_000,
    "1 1/" * 30_000, "answer is " * 10_000, "1,111" * 20_000, "\\text{" * 20_000, "1,234," * 20_000, "answer" + " " * 100_000,
    "1 1/" + "1" * 9_000 + "," * 9_000 + "1",
]  # fmt: skip


@pytest.mark.parametrize("text", EVIL, ids=lambda t: t[:8])
def test_hostile_texts_are_bounded(text):
    # at most 0.3 s of the processor when this was written: 20,000 characters are read, and work of their square takes seconds
    start = time.process_time()
    answers.final_number(text), answers.parse(text), answers.exact_match(text, "3")
    assert time.process_time() - start < 1


def test_all_gold_answers_of_gsm8k():
    rows = [json.loads(line) for line in shared_data("math/gsm8k.train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 7473
    for row in rows:
        gold = row["answer"].rsplit("####", 1)[1].strip()
        value = int(gold.replace(",", ""))
        assert answers.final_number(row["answer"]).value == answers.gold_number(gold).value == value
        assert answers.numeric_match(row["answer"], gold)
        assert not answers.numeric_match(f"#### {value + 1}", gold)
