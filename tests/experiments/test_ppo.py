"""PPO's options: a coefficient that follows a KL, PPO-ptx, the dual clip, adapters; and a run that is stopped among them."""

import json

import pytest

from experiments import ppo, reward
from jaxllm import launch
from jaxllm.core.types import UserError
from tests.experiments.test_resume import Stopped, digest


@pytest.fixture(scope="module")
def small(base, files, tmp_path_factory):
    """Overrides of a run with every option on, on one device."""
    judge = tmp_path_factory.mktemp("judge")
    pairs = {"steps": 2, "batch_size": 8, "init": str(base), "data.path": files["pairs"], "data.length": 32}
    launch.start(reward.main, "reward", pairs, judge)
    return {
        "steps": 3, "save_every": 1, "batch_size": 8, "log_every": 1, "init": str(base), "reward_model": str(judge),
        "data.path": files["prompts"], "max_prompt": 20, "max_new_tokens": 8, "data.ptx": files["text"], "ptx_coef": 0.5,
        "kl_target": 0.5, "kl_coef": 0.3, "loss": "dual_clip", "epochs": 1,
    }  # fmt: skip


def metrics_of(workdir):
    return [m for m in map(json.loads, (workdir / "metrics.jsonl").open()) if "objective/kl" in m]


def test_the_coefficient_follows_the_kl_and_a_stopped_run_continues_with_it(small, tmp_path, monkeypatch):
    launch.start(ppo.main, "ppo", small, tmp_path / "whole")
    rows = metrics_of(tmp_path / "whole")
    coef = 0.3
    for m in rows:
        assert m["objective/kl_coef"] == pytest.approx(coef, rel=1e-5)
        coef *= 1 + 0.1 * max(-0.2, min(0.2, m["objective/kl"] / 0.5 - 1))
    assert rows[1]["objective/kl_coef"] == pytest.approx(0.3 * 0.98, rel=1e-5), "at the start the KL is 0: below the target"
    assert rows[0]["loss/ptx_avg"] > 0
    from jaxllm.train import loop

    real, calls = loop.fetch, []

    def stop_at_the_third(pending):
        calls.append(1)
        if len(calls) == 3:
            raise Stopped
        return real(pending)

    monkeypatch.setattr(loop, "fetch", stop_at_the_third)
    with pytest.raises(Stopped):
        launch.start(ppo.main, "ppo", {**small, "steps": 3}, tmp_path / "stopped")
    monkeypatch.setattr(loop, "fetch", real)
    launch.start(ppo.main, "ppo", small, tmp_path / "stopped")
    assert digest(tmp_path / "whole") == digest(tmp_path / "stopped")
    assert [m["objective/kl_coef"] for m in metrics_of(tmp_path / "stopped")] == [m["objective/kl_coef"] for m in rows]


def test_adapters_of_the_policy_beside_a_whole_value_model(small, tmp_path):
    overrides = {**small, "steps": 1, "lora.rank": 2, "ptx_coef": 0.0, "kl_target": 0.0}
    launch.start(ppo.main, "ppo", overrides, tmp_path)
    (first,) = metrics_of(tmp_path)
    assert abs(first["objective/kl"]) < 1e-4 and first["first/val/ratio"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "wrong,message",
    [
        ({"loss": "clip"}, "config.loss='clip': choose one of ppo, dual_clip"),
        ({"dual": 1.1}, "config.dual=1.1 must be above"),
        ({"kl_coef": 0.0}, "config.kl_target=0.5 with kl_coef=0.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(small, tmp_path, wrong, message):
    with pytest.raises(UserError, match=message):
        launch.start(ppo.main, "ppo", {**small, **wrong}, tmp_path)
