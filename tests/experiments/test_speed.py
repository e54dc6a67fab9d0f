"""What a run says of its time, its speed and its layout, and that it ends when a program is compiled twice."""

import json

import jax
import numpy as np
import pytest

from experiments import common, pretrain, speed
from jaxllm import launch
from jaxllm.core import sharding
from jaxllm.core.types import UserError
from jaxllm.models import decoder, families, flops
from jaxllm.train import chips, profile
from jaxllm.train.compiled import Recompiled
from tests.experiments.conftest import TINY

PEAK = 1e12


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    """A run of four steps on two devices of a chip with a known peak, two of the steps traced."""
    workdir = tmp_path_factory.mktemp("speed") / "run"
    overrides = {
        **TINY, "steps": 4, "save_every": 2, "data.path": files["text"], "mesh.fsdp": 2, "profile": "2:3", "show_sharding": True
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chips, "of", lambda kind: chips.Chip("toy", PEAK, 2**34, 1, 1, 1, 1))
        launch.start(pretrain.main, "pretrain", overrides, workdir)
    return workdir


def rows_of(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in lines if "train/loss" in row]


def test_every_line_has_the_seconds_of_each_part(run):
    rows = rows_of(run)
    assert ["time/first_step" in row for row in rows] == [True, False, False, False]
    for row in rows:
        assert {f"time/{part}" for part in profile.PARTS} <= row.keys()
        assert row["time/step"] > 0 or row["step"] == 1
    assert rows[2]["time/save"] > 0, "the checkpoint of step 2"
    totals = json.loads((run / "times.json").read_text())
    assert totals["steps"] == 4
    assert totals["time/step"] >= sum(row["time/step"] for row in rows) - 1e-5
    assert totals["time/eval"] > 0 == sum(row["time/eval"] for row in rows), "the evaluation is behind the last line"


def test_speed_is_counted_from_the_second_line_on(run):
    first, *rows = rows_of(run)
    assert "perf/mfu" not in first and "perf/tokens_per_second" not in first
    config = families.from_dict(json.loads((run / "checkpoints" / "4" / "meta" / "metadata").read_text())["model"])
    count = flops.train_flops(config, 8, 32)
    for row in rows:
        seconds = row["time/data"] + row["time/step"]
        assert row["perf/tokens_per_second"] == pytest.approx(8 * 32 / seconds, rel=1e-5)
        assert row["perf/mfu"] == pytest.approx(count / seconds / 2 / PEAK, rel=1e-5)
        assert row["perf/flops_per_second_per_device"] == pytest.approx(row["perf/mfu"] * PEAK, rel=1e-5)
    assert first["perf/programs_compiled"] > 0 and rows[-1]["perf/programs_compiled"] == 0
    log = (run / "log.txt").read_text()
    assert log.count(flops.CONVENTION) == 1 and "MFU of 1e+12 FLOP/s x 2 x cpu" in log


def test_the_trace_and_the_layout_are_there(run):
    assert list((run / "profile").rglob("*.xplane.pb"))
    log = (run / "log.txt").read_text()
    assert f"profile: steps 2 to 3 in {run / 'profile'}" in log
    assert "sharding: fsdp=2 (2 devices)" in log
    (line,) = [words for words in map(str.split, log.splitlines()) if words[:1] == ["policy/layers/ffn/up/kernel"]]
    assert line[1:] == ["2x32x64", "float32", "layers,", "embed>fsdp,", "mlp", "2x16x64", "8", "KiB", "1"]


def test_the_report_tells_them(run):
    page = (run / "report.html").read_text()
    assert "MFU, median" in page and 'aria-label="MFU"' in page and 'aria-label="time/step"' not in page
    for part in ("first step: tracing and compiling", "waiting for data", "training steps", "evaluation", "checkpoints"):
        assert f"<td>{part}</td>" in page


@pytest.mark.parametrize(
    "text,said", [("3", "as in 10:15"), ("2:9", r"config.profile='2:9': the run has 3 steps \(config.steps\): use 1:3")]
)
def test_a_window_that_cannot_be_is_said_before_anything_is_trained(files, tmp_path, text, said):
    overrides = {**TINY, "steps": 3, "data.path": files["text"], "profile": text}
    with pytest.raises(UserError, match=said):
        launch.start(pretrain.main, "pretrain", overrides, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_step_that_is_compiled_twice_ends_the_run(files, tmp_path, monkeypatch):
    real = sharding.put_batch
    calls = []

    def narrower(batch, mesh):
        calls.append(1)
        return real({**batch, "segments": batch["segments"].astype(np.int8)} if len(calls) == 3 else batch, mesh)

    monkeypatch.setattr(common.sharding, "put_batch", narrower)
    overrides = {**TINY, "steps": 4, "data.path": files["text"]}
    with pytest.raises(Recompiled, match=r"the train step was compiled again at call 3 .*batch/segments was int32.* now int8"):
        launch.start(pretrain.main, "pretrain", overrides, tmp_path / "run")
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2]


# ---- FLOPs of a step


def test_flops_of_rows_of_pairs_and_of_what_has_no_formula():
    config = decoder.DecoderConfig(vocab_size=50, d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, d_ff=32, max_length=32)
    row = {"tokens": np.zeros((4, 24), np.int32)}
    one = flops.train_flops(config, 2, 24)
    assert speed.step_flops(config, row, 2) == one
    assert speed.step_flops(config, {"chosen": row, "rejected": row, "ref": np.zeros(4)}, 2) == 2 * one
    assert speed.step_flops(config, row, 2, head=False) == one - 6 * 50 * 16 * 2 * 24
    assert speed.step_flops(config, {"completion": row, "mismatched": row}, 2) is None, "one side has no gradient"


def test_sampling_and_partly_frozen_weights_have_no_mfu():
    notes, mesh = [], sharding.make_mesh({})
    recorder = type("R", (), {"note": staticmethod(notes.append)})
    model = decoder.make(decoder.DecoderConfig(vocab_size=50, d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, d_ff=32))
    state = common.TrainState(jax.numpy.int32(3), {"policy": {}}, ())
    columns = {"tokens": np.zeros((4, 24), np.int32)}
    seconds = {"time/data": 1.0, "time/step": 1.0}
    for frozen, whole, rated in (({}, False, False), ({"policy": {}}, True, False), ({"reference": {}}, True, True)):
        add = speed.meter(recorder, mesh, model, state, frozen, columns, 2, 48.0, whole=whole)
        values = add(5, {"loss": 1.0, **seconds})
        assert values["perf/tokens_per_second"] == 48.0 and values["loss"] == 1.0
        assert ("perf/flops_per_second_per_device" in values) is rated and "perf/mfu" not in values
    assert "no FLOPs are counted" in notes[0] and notes[0] == notes[1] and "no data-sheet peak" in notes[2]
