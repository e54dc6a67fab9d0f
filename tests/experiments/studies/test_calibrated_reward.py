import json
from fractions import Fraction

import numpy as np

from experiments.studies import calibrated_reward
from experiments.studies.lab import paid
from jaxllm import launch

TINY = {
    "seeds": 2, "width": 16, "layers": 1, "names": 6, "known": 16, "unknown": 8, "choices": 4, "read_steps": 3, "tune_steps": 2,
    "read_batch": 16, "steps": 2, "every": 1, "batch_size": 16,
}  # fmt: skip


def test_it_runs_and_reports(quick_compile, tmp_path):
    launch.start(calibrated_reward.main, "studies.calibrated_reward", TINY, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    claims = {claim["name"]: claim for claim in result["claims"]}
    assert {claim["kind"] for claim in claims.values()} == {"gate", "finding"}
    assert all(claims[c.name]["holds"] for c in calibrated_reward.algebra())
    pay = claims["pay after RL less pay after supervised tuning"]
    assert pay["low"] < pay["value"] < pay["high"]
    assert "all cross at p = 0.8" in result["findings"]
    assert {p.stem for p in (tmp_path / "figures").glob("*.svg")} == {"actions", "pay"}


def test_the_lecture_never_pays_for_hedging():
    assert not paid.hedging_pays(paid.LECTURE)
    for p in (Fraction(k, 100) for k in range(101)):
        answered, hedged = (p * right + (1 - p) * wrong for right, wrong in paid.LECTURE)
        assert answered == 5 * p - 4 and hedged == answered / 2  # between answering and abstaining, wherever p is


def test_another_table_does():
    paying = paid.hedging_pays(paid.BAND)
    assert min(paying) == Fraction(2, 3) + Fraction(1, 840) and max(paying) == Fraction(6, 7) - Fraction(1, 840)
    assert len(paying) == (max(paying) - min(paying)) * 840 + 1


def test_a_known_threshold_is_found():
    sure = np.linspace(0, 1, 201)
    assert abs(paid.threshold(sure, 1 / (1 + np.exp(-30 * (sure - 0.8)))) - 0.8) < 0.01


def test_means_leave_out_what_is_not_chosen():
    values = np.array([[1.0, 2.0], [3.0, 4.0]])
    found = paid.mean_where(values, np.array([[True, False], [False, False]]))
    assert found[0] == 1 and np.isnan(found[1])
