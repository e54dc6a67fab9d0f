"""Rewards of form: pattern, length, repetition; and the calibrated table."""

import numpy as np
import pytest

from jaxllm.generate.rewards import text
from jaxllm.generate.rewards.answers import numeric_match


def test_format_is_the_whole_text_and_capped():
    pattern = r"<think>.*</think>\s*<answer>.*</answer>"
    assert text.format_match("<think>a\nb</think> <answer>4</answer>", pattern) == 1
    assert text.format_match("x<think>a</think><answer>4</answer>", pattern) == 0
    assert text.format_match("a" * 11, "a*", most=10) == 0 and text.format_match("a" * 10, "a*", most=10) == 1
    with pytest.raises(ValueError, match="no regular expression"):
        text.format_match("a", "(")


def test_length_peaks_at_the_target():
    values = [text.length_reward(n, 10) for n in (0, 5, 10, 15, 20, 1000)]
    np.testing.assert_allclose(values, [0, 0.5, 1, 0.5, 0, -1])
    with pytest.raises(ValueError, match="target=0"):
        text.length_reward(1, 0)


def test_repetition_counts_ngrams_again():
    assert text.repetition_penalty("a b c d") == 0 and text.repetition_penalty("") == 0 and text.repetition_penalty("a b") == 0
    # 6 trigrams, 1 distinct
    assert text.repetition_penalty("the " * 8) == pytest.approx(-5 / 6)
    # a b c a b c: abc bca cab abc
    assert text.repetition_penalty("a b c A B C", most=-2.0) == pytest.approx(-0.5)


@pytest.mark.parametrize(
    "said,how", [("It is 4.", "unhedged"), ("I think it is 4.", "hedged"), ("Probably 4", "hedged"), ("I don't know.", "abstain")]
)
def test_stance(said, how):
    assert text.stance(said) == how


@pytest.mark.parametrize(
    "said,reward", [("4", 1), ("I think 4", 0.5), ("I do not know, 4", 0), ("I do not know", 0), ("maybe 5", -2), ("5", -4)]
)
def test_the_schulman_table(said, reward):
    assert text.abstention(said, "4", correct=numeric_match) == reward


def test_another_table_is_an_argument():
    table = {**text.SCHULMAN, ("hedged", False): -1.0}
    assert text.abstention("maybe 5", "4", correct=numeric_match, table=table) == -1
    p = np.linspace(0, 1, 1001)
    pay = lambda how, t: p * t[how, True] + (1 - p) * t[how, False]  # noqa: E731
    default, other = ({how: pay(how, t) for how in ("unhedged", "hedged", "abstain")} for t in (text.SCHULMAN, table))
    assert not np.any(default["hedged"] > np.maximum(default["unhedged"], default["abstain"]) + 1e-9)
    band = p[other["hedged"] > np.maximum(other["unhedged"], other["abstain"]) + 1e-9]
    assert band.min() == pytest.approx(2 / 3, abs=2e-3) and band.max() == pytest.approx(6 / 7, abs=2e-3)
