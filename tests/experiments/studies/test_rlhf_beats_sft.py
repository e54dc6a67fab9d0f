import json

import jax
import numpy as np

from experiments.studies import rlhf_beats_sft
from experiments.studies.lab import demonstrations
from jaxllm import launch
from jaxllm.worlds import pref

TINY = {
    "seeds": 2, "widths": (8,), "noise": (0.0, 0.9), "judge_width": 8, "length": 6, "best_of": 2, "demonstrations": 16,
    "sft_steps": 2, "sft_batch": 8, "pairs": 16, "judge_steps": 2, "steps": 2, "batch_size": 8, "looks": 16,
}  # fmt: skip


def test_it_runs_and_reports(quick_compile, tmp_path):
    launch.start(rlhf_beats_sft.main, "studies.rlhf_beats_sft", TINY, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert {claim["kind"] for claim in result["claims"]} == {"gate", "finding"}
    wins = result["claims"][0]
    assert 0 <= wins["value"] <= 1 and wins["low"] <= wins["value"] <= wins["high"]
    assert "a knob" in result["findings"]
    assert (tmp_path / "figures" / "wins.svg").stat().st_size > 1000


def test_wins_count_ties_half():
    one, other = np.array([[1.0, 2.0, 3.0, 4.0]]), np.array([[0.0, 2.0, 5.0, 4.0]])
    np.testing.assert_allclose(rlhf_beats_sft.wins(one, other), [0.5])


def test_careful_demonstrations_are_better_and_answer_the_same_prompts():
    world = pref.make(jax.random.key(0), length=12, prompt=4)
    begun = pref.prompts(world, jax.random.key(1), 256)
    careless = demonstrations.strings(world, jax.random.key(2), begun)
    careful = demonstrations.best_of(world, jax.random.key(3), begun, 8)
    assert np.array_equal(careful["tokens"][:, :5], begun)
    assert pref.gold(world, careful).mean() > pref.gold(world, careless).mean() + 0.7
