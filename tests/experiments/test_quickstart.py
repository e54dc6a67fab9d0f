"""The quickstart's arithmetic: pace and claims. The run itself is checked in .ci/run."""

import numpy as np
import pytest

from experiments.quickstart import judge, pace
from experiments.quickstart.claims import claims_of

GOOD = {
    "base/answered_raw": 0.1, "base/answered_chat": 0.1, "sft/in_format": 0.99, "sft/greedy_exact_test": 0.5,
    "base/greedy_exact_test": 0.0, "sft/greedy_exact_template": 0.4, "base/greedy_exact_template": 0.0, "reward/accuracy": 0.8,
    "reward/length_only_accuracy": 0.6, "dpo/gain": 0.3, "dpo/gain_se": 0.03, "ppo/gain": 0.4, "ppo/gain_se": 0.03,
    "ppo/refused_unsafe": 0.9, "ppo/refused_lookalike": 0.05, "ppo/refused_plain": 0.01, "sft/exact": 0.3, "ppo/exact": 0.28,
    "ppo/kl": 1.0, "ppo/length": 7.0, "sft/length": 12.0, "ppo/first_ratio": 1.00001, "ppo/first_kl": 1e-6,
}  # fmt: skip


def test_a_slow_machine_still_trains_what_the_claims_need():
    chosen = pace.choose(1.0, 360.0)
    assert (chosen["pretrain_steps"], chosen["sft_steps"]) == (pace.PRETRAIN[0], pace.SFT[0])
    assert pace.seconds(1.0, chosen["pretrain_steps"], chosen["sft_steps"]) > 360


def test_spare_time_goes_to_fine_tuning_then_to_pretraining_and_stays_within_the_budget():
    chosen = [pace.choose(unit, 360.0) for unit in (0.09, 0.08, 0.07, 0.05)]
    sft = [c["sft_steps"] for c in chosen]
    assert sft == sorted(sft) and sft[-1] == pace.SFT[1]
    assert chosen[-1]["pretrain_steps"] == pace.PRETRAIN[1]
    for unit, c in zip((0.09, 0.08, 0.07, 0.05), chosen, strict=True):
        least = c["sft_steps"] == pace.SFT[0]
        assert least or pace.seconds(unit, c["pretrain_steps"], c["sft_steps"]) <= 360


def test_given_step_counts_are_kept():
    chosen = pace.choose(0.05, 360.0, pretrain=7, sft=9)
    assert (chosen["pretrain_steps"], chosen["sft_steps"]) == (7, 9)


def test_all_claims_hold_for_good_metrics():
    claims = claims_of(GOOD)
    assert len(claims) == 19 and all(c.holds for c in claims)


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        ("base/answered_raw", 0.3), ("sft/in_format", 0.9), ("reward/accuracy", 0.7), ("reward/length_only_accuracy", 0.78),
        ("dpo/gain", 0.1), ("dpo/gain_se", 0.2), ("ppo/gain", 0.1), ("ppo/refused_unsafe", 0.5), ("ppo/refused_lookalike", 0.4),
        ("ppo/refused_plain", 0.1), ("ppo/exact", 0.1), ("ppo/kl", 3.0), ("ppo/length", 11.0), ("ppo/first_ratio", 1.01),
        ("ppo/first_kl", 1e-3), ("sft/greedy_exact_template", 0.2), ("ppo/gain", float("nan")),
    ],
)  # fmt: skip
def test_each_claim_can_fail(metric, value):
    assert not all(c.holds for c in claims_of({**GOOD, metric: value}))


def test_paired_standard_error_is_that_of_the_differences():
    a, b = np.array([1.0, 2.0, 4.0]), np.array([0.0, 2.0, 1.0])
    mean, se = judge.paired(a, b)
    assert mean == pytest.approx(4 / 3)
    assert se == pytest.approx(np.std([1, 0, 3], ddof=1) / 3**0.5)


def test_calibration_of_a_perfect_and_of_an_overconfident_model():
    rng = np.random.default_rng(0)
    size = np.abs(rng.normal(size=20_000)) * 2
    agree = rng.random(20_000) < 1 / (1 + np.exp(-size))
    predicted, observed, counts = judge.calibration(np.where(agree, size, -size))
    assert counts.sum() == 20_000 and np.abs(predicted - observed)[counts > 300].max() < 0.05
    predicted, observed, counts = judge.calibration(np.where(agree, 4 * size, -4 * size))
    assert (predicted - observed)[counts > 300].max() > 0.1
