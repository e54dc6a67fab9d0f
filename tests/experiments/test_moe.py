"""Mixtures of experts train on a simulated mesh, next to their dense twin."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from configs import moe as recipes
from experiments import moe
from jaxllm import launch
from jaxllm.core import tree
from jaxllm.core.types import UserError
from jaxllm.models.presets import PRESETS
from jaxllm.train.checkpoint import restore_params
from tests.experiments.conftest import TINY

SMALL = {**TINY, "model.moe.d_ff": 32, "model.moe.n_experts": 4, "steps": 3}


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def biases_of(workdir):
    flat = tree.flatten(restore_params(workdir)[0]["policy"])
    return next((np.asarray(x) for path, x in flat.items() if path.endswith("router/bias")), None)


@pytest.mark.parametrize(
    "variant,mesh", [(None, {"mesh.data": 2, "mesh.expert": 4}), ("loss-free", {"mesh.expert": 2, "mesh.tensor": 2})]
)
def test_three_steps_on_a_mesh_log_the_routers(files, tmp_path, variant, mesh):
    launch.start(moe.main, "moe", {**SMALL, **mesh, "data.path": files["text"]}, tmp_path / "run", variant=variant)
    steps = [m for m in metrics_of(tmp_path / "run") if "train/loss" in m]
    assert [m["step"] for m in steps] == [1, 2, 3]
    for m in steps:
        assert math.isfinite(m["train/loss"]) and m["moe/drops"] == 0
        assert 0 <= m["moe/load_min"] <= 1 <= m["moe/load_max"] <= 4
        assert 0 < m["moe/router_entropy"] <= math.log(4) + 1e-6 and m["moe/load_balance_loss"] > 0.9
    bias = biases_of(tmp_path / "run")
    if variant is None:
        assert bias is None
    else:  # whole steps of the rate, whatever the clipped gradients were
        assert bias.any()
        np.testing.assert_allclose(bias / 0.01, np.round(bias / 0.01), atol=1e-4)
        assert np.abs(bias).max() <= 0.03 + 1e-6


def test_the_dense_twin_is_trained_too_with_equal_active_parameters(files, tmp_path):
    overrides = {**SMALL, "data.path": files["text"], "compare": True, "model.moe.capacity_factor": 0.5, "model.moe.top_k": 1}
    result = launch.start(
        moe.main, "moe", {**overrides, "model.moe.normalise": False, "model.moe.n_shared": 1}, tmp_path / "run", variant="switch"
    )["metrics"]
    twin = json.loads((tmp_path / "run" / "dense" / "result.json").read_text())["metrics"]
    assert result["dense/eval/loss"] == twin["eval/loss"] != result["eval/loss"]
    routers = 2 * 32 * 4  # layers, width, experts
    assert result["parameters_active"] - routers == twin["parameters"] == twin["parameters_active"] < result["parameters"]
    assert any(m.get("moe/drops", 0) > 0 for m in metrics_of(tmp_path / "run"))
    assert not any("moe/drops" in m for m in metrics_of(tmp_path / "run" / "dense"))


@pytest.mark.parametrize(
    "name,active", [("mixtral-8x7b", 12.9e9), ("qwen3-30b-a3b", 3.3e9), ("deepseek-v2", 21e9), ("deepseek-v3", 37e9)]
)
def test_published_sizes_have_the_published_active_parameters(name, active):
    without_mtp = replace(PRESETS[name], mtp_layers=0)
    assert moe.active_count(without_mtp) == pytest.approx(active, rel=0.025)
    config = recipes.get_config(name)
    built = moe.config_of(config, PRESETS[name].vocab_size)
    assert built == PRESETS[name]


@pytest.mark.parametrize("variant", recipes.SMALL)
def test_small_recipes_have_the_width_of_the_dense_model(variant):
    c = moe.config_of(recipes.get_config(variant), 1024)
    assert moe.active_width(c) == PRESETS["tiny"].d_ff == moe.dense_twin(c).d_ff


def test_what_cannot_work_is_said(tmp_path):
    for overrides, message in (
        ({"model.moe.top_k": 1}, "router learns nothing"),
        ({"model.moe.top_k": 9}, "top_k=9 is more than the 8 experts"),
    ):
        with pytest.raises(UserError, match=message):
            launch.start(moe.main, "moe", overrides, tmp_path / "run")
    with pytest.raises(UserError, match="no dense twin"):
        moe.dense_twin(PRESETS["deepseek-v2-lite"])
    with pytest.raises(UserError, match="unknown variant 'gshard': choose one of tiny, switch"):
        recipes.get_config("gshard")
