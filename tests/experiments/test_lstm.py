"""experiments.lstm on a simulated mesh: three steps each, what it reports, and what it refuses."""

import json
import math

import pytest

from experiments import lstm
from jaxllm import launch
from jaxllm.core.types import UserError
from jaxllm.train.checkpoint import newest_meta
from tests.experiments.conftest import MESH

SMALL = {
    "steps": 3, "batch_size": 8, "log_every": 1, "tokenizer": "byte", "data.length": 32, "model.d_hidden": 24,
    "model.max_length": 96,
}  # fmt: skip


@pytest.mark.parametrize(("variant", "width"), [(None, "model.d_model"), ("tiny-elmo", "model.width")])
def test_three_steps_on_a_mesh(files, tmp_path, variant, width):
    overrides = {**SMALL, **MESH, width: 16, "data.path": files["text"]}
    result = launch.start(lstm.main, "lstm", overrides, tmp_path / "run", variant=variant)
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [m for m in logged if "train/loss" in m]
    assert [m["step"] for m in steps] == [1, 2, 3] and all(math.isfinite(m["train/loss"]) for m in steps)
    assert steps[0]["train/loss"] == pytest.approx(math.log(262), abs=0.3) and steps[2]["train/loss"] < steps[0]["train/loss"]
    assert ("train/backward" in steps[0]) == (variant is not None)
    metrics = result["metrics"]
    assert metrics["perf/tokens_per_second"] > 0 and math.isfinite(metrics["eval/loss"])
    meta = newest_meta(tmp_path / "run")
    assert meta["model"]["family"] == ("lstm" if variant is None else "elmo")
    layer = 4 * 24 * (16 + 16 + 1) + 24 * 16
    expected = 262 * 16 + 262 + (layer if variant is None else 4 * layer + 4)
    assert metrics["parameters"] == expected


def test_one_device_and_a_mesh_train_alike(files, tmp_path):
    losses = []
    for name, mesh in (("one", {}), ("many", MESH)):
        overrides = {**SMALL, **mesh, "model.d_model": 16, "data.path": files["text"]}
        launch.start(lstm.main, "lstm", overrides, tmp_path / name)
        logged = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([m["train/loss"] for m in logged if "train/loss" in m])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"family": "gru"}, "choose one of lstm, elmo"),
        ({"model.d_hidden": 0}, "d_hidden=0"),
        ({"data.length": 200}, "longer than the model's context of 96"),
        ({"batch_size": 6, "mesh.data": 4}, "does not divide"),
    ],
)
def test_settings_that_cannot_work(files, tmp_path, changes, match):
    with pytest.raises(UserError, match=match):
        launch.start(lstm.main, "lstm", {**SMALL, "data.path": files["text"], **changes}, tmp_path / "run")


def test_an_unknown_variant_is_refused(tmp_path):
    with pytest.raises(UserError, match="zaremba-medium"):
        launch.start(lstm.main, "lstm", {}, tmp_path / "run", variant="zaremba-huge")
