"""The studies on judging and on reward models run at a tiny size and leave claims, figures and a paragraph."""

import json

import numpy as np
import pytest

from experiments.studies import judging
from experiments.studies.reward_model import __main__ as reward_model
from experiments.studies.reward_model.arms import chosen
from jaxllm import launch

SIZES = {
    "judging": (judging, {"seeds": 2, "battles": 300, "shuffles": 4, "resamples": 5}),
    "reward_model": (
        reward_model,
        {
            "seeds": 2, "pairs": (40, 80), "test_pairs": 64, "width": 16, "layers": 1, "length": 8, "pretrain_steps": 4,
            "steps": 4, "every": 2, "batch_size": 20, "rankings": 20, "k": 3, "passes": 1,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_studies_run_at_a_tiny_size(name, tmp_path):
    module, overrides = SIZES[name]
    got = launch.start(module.main, f"studies.{name}", overrides, tmp_path)
    kinds = {claim["kind"] for claim in got["claims"]}
    assert kinds == {"gate", "finding"} and "simulated" in got["findings"].lower()
    assert all(claim["value"] is not None for claim in got["claims"])
    assert any(claim["low"] is not None and claim["low"] <= claim["value"] for claim in got["claims"])
    assert list((tmp_path / "figures").glob("*.svg"))
    failed = [claim["name"] for claim in json.loads((tmp_path / "result.json").read_text())["claims"] if not claim["holds"]]
    assert got["findings"].endswith(f"Did not come out: {'; '.join(failed) or 'nothing'}.")


def test_judging_gates_hold_at_half_the_size(tmp_path):
    got = launch.start(judging.main, "studies.judging", {"seeds": 3, "battles": 2000, "shuffles": 10, "resamples": 20}, tmp_path)
    assert [claim["name"] for claim in got["claims"] if claim["kind"] == "gate" and not claim["holds"]] == []
    assert got["metrics"]["swapped, length/error"] < got["metrics"]["swapped/error"] < got["metrics"]["biased/error"]


def test_the_step_is_chosen_by_validation_labels_alone():
    curves = {"valid_loss": np.array([[3.0, 1.0, 2.0], [1.0, 2.0, 3.0]]), "margin": np.arange(12).reshape(2, 3, 2)}
    np.testing.assert_array_equal(chosen(curves, "margin"), [[2, 3], [6, 7]])
