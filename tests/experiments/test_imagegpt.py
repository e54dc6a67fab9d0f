"""experiments.imagegpt on a simulated mesh: three steps, probes, pictures."""

import json
import math

import numpy as np
import pytest

from experiments import imagegpt
from jaxllm import launch
from jaxllm.core.types import UserError
from jaxllm.worlds import images as world
from tests.experiments.conftest import MESH, write_rows

SMALL = {
    "steps": 3, "batch_size": 8, "log_every": 1, "model.d_model": 16, "model.n_layers": 2, "model.d_ff": 32,
    "model.max_length": 64, "data.size": 8, "data.colours": 8, "data.images": 200,
    "probe.rows": 60, "probe.test_rows": 40, "probe.seeds": 2, "samples": 3,
}  # fmt: skip


def losses(workdir):
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [m["train/loss"] for m in logged if "train/loss" in m]


def test_three_steps_on_a_mesh_then_probes_and_pictures(tmp_path):
    result = launch.start(imagegpt.main, "imagegpt", {**SMALL, **MESH}, tmp_path / "run")
    found = losses(tmp_path / "run")
    assert len(found) == 3 and all(map(math.isfinite, found)) and found[0] == pytest.approx(math.log(8), abs=1.2)
    metrics = result["metrics"]
    assert metrics["eval/bits_per_pixel"] == pytest.approx(metrics["eval/loss"] / math.log(2))
    assert {"probe/best", "probe/raw_pixels", "probe/untrained"} <= metrics.keys() and len(result["claims"]) == 2
    assert all(0 <= metrics[f"probe/{n}"] <= 1 for n in ("best", "raw_pixels", "untrained"))
    for name in ("samples.png", "completions.png", "probe.svg"):
        assert (tmp_path / "run" / "figures" / name).stat().st_size > 200
    assert (tmp_path / "run" / "report.html").read_text().count("data:image/") == 3
    # what was trained predicts the colours and not the start token
    loaded = launch.load(tmp_path / "run")
    assert loaded.model.config.outputs == 8 and loaded.model.config.vocab_size == loaded.tokenizer.vocab_size == 9


def test_pictures_in_a_file_get_a_palette(tmp_path):
    drawn = world.draw(120, seed=0, size=8)
    rng = np.random.default_rng(0)
    rgb = np.clip(world.palette()[drawn.pixels].astype(int) + rng.integers(-5, 6, (120, 8, 8, 3)), 0, 255).astype(np.uint8)
    np.savez(tmp_path / "a.npz", images=rgb)
    overrides = {**SMALL, "steps": 1, "data.path": str(tmp_path / "a.npz"), "data.colours": 6}
    result = launch.start(imagegpt.main, "imagegpt", overrides, tmp_path / "run")
    assert "probe/best" not in result["metrics"] and math.isfinite(result["metrics"]["eval/loss"])
    assert len(json.loads((tmp_path / "run" / "palette.json").read_text())) == 6


def test_completions_keep_the_upper_half(tmp_path, monkeypatch):
    sheets = {}
    monkeypatch.setattr(imagegpt.images, "grid", lambda images, columns, **_: sheets.setdefault(len(sheets), images)[0])
    overrides = {**SMALL, "steps": 1, "probe.rows": 0}
    launch.start(imagegpt.main, "imagegpt", overrides, tmp_path / "run")
    samples, completions = sheets[0], sheets[1].reshape(4, 3, 8, 8, 3)
    assert samples.shape == (6, 8, 8, 3)
    original, given, *completed = completions
    for image in completed:
        np.testing.assert_array_equal(image[:, :4], original[:, :4])
    np.testing.assert_array_equal(given[:, :4], original[:, :4])
    assert (completed[0][:, 4:] != completed[1][:, 4:]).any()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"data.size": 9}, "81 pixels, more than model.max_length=64"),
        ({"data.colours": 9}, "8 distinct colours, fewer than data.colours=9"),
        ({"model.n_heads": 3}, "n_heads=3 does not divide"),
        ({"batch_size": 1000}, "more than the"),
        ({"data.path": "nowhere.npz"}, "nowhere.npz"),
    ],
)
def test_settings_that_cannot_work(tmp_path, changes, match):
    with pytest.raises(UserError, match=match):
        launch.start(imagegpt.main, "imagegpt", {**SMALL, **changes}, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_index_beyond_the_palette_is_refused(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"pixels": [0, 1, 2, 12]}] * 20)
    with pytest.raises(UserError, match="palette index 12, data.colours=8"):
        launch.start(imagegpt.main, "imagegpt", {**SMALL, "data.path": path}, tmp_path / "run")
