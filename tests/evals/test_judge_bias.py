"""Probes on judges whose biases are known."""

import numpy as np

from jaxllm.evals import judge_bias, stats

RNG = np.random.default_rng(0)
N = 4000
QUALITY = RNG.normal(size=(2, N))


def judge(position, length=0.0):
    """Answers are (quality, length) rows; the judge gives a probability."""

    def preference(prompts, first, second):
        first, second = np.asarray(first), np.asarray(second)
        gap = first - second
        return np.clip(stats.sigmoid(gap[:, 0] + length * gap[:, 1]) + position, 0, 1)

    return preference


def answers(lengths):
    return [np.column_stack([q, n]) for q, n in zip(QUALITY, lengths, strict=True)]


def test_an_additive_position_bias_is_measured_and_cancels():
    a, b = (x * np.array([[0.3, 1.0]]) for x in answers(np.zeros((2, N))))  # narrow: no probability is clipped
    fair = judge_bias.both_orders(judge(0.0), [""] * N, a, b)
    biased = judge_bias.both_orders(judge(0.2), [""] * N, a, b)
    np.testing.assert_allclose(judge_bias.position_bias(biased).mean, 0.2, atol=2e-3)
    np.testing.assert_allclose(judge_bias.position_bias(fair).mean, 0, atol=1e-12)
    np.testing.assert_allclose(judge_bias.swap_average(biased), judge_bias.swap_average(fair), atol=0.05)
    np.testing.assert_allclose(judge_bias.swap_average(biased).mean(), judge_bias.swap_average(fair).mean(), atol=2e-3)
    assert judge_bias.consistency(fair).mean == 1
    share = np.mean(np.abs(fair.a_first - 0.5) > 0.2)  # whoever is further from 1/2 than the bias is named both times
    np.testing.assert_allclose(judge_bias.consistency(biased).mean, share, atol=1e-9)


def test_the_length_coefficient_at_equal_quality():
    lengths = QUALITY + RNG.normal(size=(2, N))  # better answers are longer
    a, b = answers(lengths)
    for bias in (0.0, 0.5):
        p = judge(0.0, bias)(None, a, b)
        verdict = (RNG.random(N) < p).astype(float)
        controlled = judge_bias.length_coefficient(verdict, a[:, 1] - b[:, 1], a[:, 0] - b[:, 0], resamples=60)
        assert controlled.low < bias < controlled.high
        assert judge_bias.length_coefficient(verdict, a[:, 1] - b[:, 1], resamples=20).low > bias + 0.2


def test_padding_costs_nothing_with_a_fair_judge():
    a = answers(np.zeros((2, N)))[0]
    padded = a + np.array([[0.0, 1.0]])
    assert judge_bias.padding_bias(judge(0.3), [""] * N, a, padded).mean == 0
    gain = judge_bias.padding_bias(judge(0.0, 0.5), [""] * N, a, padded)
    np.testing.assert_allclose(gain.mean, stats.sigmoid(0.5) - 0.5)
