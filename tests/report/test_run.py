"""The run directory: what is written, what survives a kill, what is refused."""

import json
import math
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.types import UserError
from jaxllm.report import files
from jaxllm.report import run as runs

CONFIG = {"steps": 10, "log_every": 1, "optim": {"lr": 1e-3, "betas": (0.9, 0.95)}, "init": None}


@pytest.fixture
def run(tmp_path):
    return runs.open_run(tmp_path / "r", "toy", CONFIG)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_opening_writes_what_the_run_was_told(run):
    config = json.loads((run.workdir / "config.json").read_text())
    assert config["optim"] == {"lr": 1e-3, "betas": [0.9, 0.95]}
    env = json.loads((run.workdir / "env.json").read_text())
    assert env["experiment"] == "toy" and env["versions"]["jax"] and env["devices"]
    assert "python -m experiments.toy" in (run.workdir / "README.txt").read_text()


def test_log_is_on_disk_at_once_and_takes_array_scalars(run):
    run.log(np.int64(3), {"train/loss": jnp.float32(1.5), "n": np.float64(2), "k": 7})
    (row,) = lines(run.workdir / "metrics.jsonl")
    assert row.pop("t") > 1e9
    assert row == {"step": 3, "train/loss": 1.5, "n": 2.0, "k": 7.0}


def test_log_survives_sigkill(tmp_path):
    program = (
        "import os, signal; from jaxllm.report.run import Run; from pathlib import Path\n"
        f"run = Run(Path({str(tmp_path)!r}), 'toy', {{}})\n"
        "for i in range(5): run.log(i, {'train/loss': i})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4]


def test_non_finite_values_are_valid_json_and_warned_about_once(run, capsys):
    run.log(1, {"train/loss": math.nan, "x": math.inf})
    run.log(2, {"train/loss": math.nan})
    text = (run.workdir / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert lines(run.workdir / "metrics.jsonl")[0]["train/loss"] is None
    assert run.warnings == ["step 1: train/loss is nan", "step 1: x is inf"]
    assert capsys.readouterr().err.count("train/loss is nan") == 1


def test_samples_hold_any_text(run):
    text = "a\u2028b \ud800 <b> \x00"
    run.sample(4, "p", text, gold=np.float32(0.5))
    assert lines(run.workdir / "samples.jsonl") == [{"step": 4, "prompt": "p", "text": text, "gold": 0.5}]


def test_truncate_drops_later_steps_and_torn_lines(run):
    for step in range(6):
        run.log(step, {"train/loss": step})
        run.sample(step, "p", "t")
    with open(run.workdir / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "train/lo')
    run.truncate(3)
    run.log(4, {"train/loss": 40})
    assert [row["step"] for row in lines(run.workdir / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in lines(run.workdir / "samples.jsonl")] == [0, 1, 2, 3]


def test_finish_writes_result_and_report(run, capsys):
    assert runs.finished(run.workdir) is None
    claims = [runs.at_least("gain", np.float32(0.5), 0.2), runs.at_most("kl", 2.5, 2.0)]
    claims.append(runs.at_least("size", 1.0, 2.0, kind="finding", low=0.5, high=np.float32(1.5)))
    run.finish({"eval/loss": jnp.float32(2.0), "n": 3, "bad": math.nan}, claims, findings="It did not grow.")
    gate = {"kind": "gate", "low": None, "high": None}
    assert runs.finished(run.workdir) == {
        "experiment": "toy",
        "metrics": {"eval/loss": 2.0, "n": 3, "bad": None},
        "claims": [
            {"name": "gain", "value": 0.5, "bound": 0.2, "better": "more", "holds": True, **gate},
            {"name": "kl", "value": 2.5, "bound": 2.0, "better": "less", "holds": False, **gate},
            {"name": "size", "value": 1.0, "bound": 2.0, "better": "more", "holds": False,
             "kind": "finding", "low": 0.5, "high": 1.5},
        ],
        "findings": "It did not grow.",
    }
    assert (run.workdir / "report.html").exists()
    out = capsys.readouterr().out
    assert "holds  gain: 0.5 (>= 0.2)" in out and "FAILS  kl: 2.5 (<= 2)" in out
    assert "no     size: 1 [0.5, 1.5] (>= 2)" in out and "It did not grow." in out
    page = (run.workdir / "report.html").read_text()
    assert "[0.5, 1.5]" in page and "It did not grow." in page


@pytest.mark.parametrize("claim", [runs.at_least, runs.at_most])
def test_a_claim_without_a_number_does_not_hold(claim):
    assert claim("x", math.nan, 0.0) [:5] == ("x", None, 0.0, claim("x", 0.0, 0.0).better, False)
    assert claim("x", 0.0, 0.0).holds is True


def test_at_most_five_warnings_are_repeated_at_the_end(run, capsys):
    for i in range(8):
        run.warn(f"warning number {i}")
    capsys.readouterr()
    run.finish({})
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 6 and "number 4" in err[4] and "3 more warnings" in err[5]


def test_only_the_first_process_writes(tmp_path, capsys):
    run = runs.open_run(tmp_path / "r", "toy", CONFIG, writes=False)
    run.log(1, {"train/loss": 1.0})
    run.note("x")
    run.warn("y")
    run.finish({"a": 1})
    assert not (tmp_path / "r").exists() and capsys.readouterr() == ("", "")


def test_other_settings_are_named_and_nothing_is_overwritten(run):
    run.log(1, {"train/loss": 1.0})
    before = {p.name: p.read_bytes() for p in run.workdir.iterdir()}
    changed = {**CONFIG, "steps": 20, "optim": {"lr": 3e-3, "betas": (0.9, 0.95)}, "more": 1}
    with pytest.raises(UserError) as error:
        runs.open_run(run.workdir, "toy", changed)
    assert str(error.value) == (
        f"Cannot resume {run.workdir}: more was not there, now 1; optim.lr was 0.001, now 0.003; "
        "steps was 10, now 20. Only log_every, save_every, save_seconds, keep, watchdog, gates, profile, show_sharding "
        "and the mesh may change on resume. To start a new run, give another --workdir"
    )
    assert {p.name: p.read_bytes() for p in run.workdir.iterdir()} == before


def test_a_directory_where_nothing_was_trained_takes_other_settings(run):
    runs.open_run(run.workdir, "toy", {**CONFIG, "steps": 20})
    assert json.loads((run.workdir / "config.json").read_text())["steps"] == 20


def test_log_every_and_the_mesh_may_change_and_another_experiment_may_not(run):
    run.log(1, {"train/loss": 1.0})
    runs.open_run(run.workdir, "toy", {**CONFIG, "mesh": {"data": 2}})
    runs.open_run(run.workdir, "toy", {**CONFIG, "log_every": 5})
    with pytest.raises(UserError, match="it is a run of toy, not other"):
        runs.open_run(run.workdir, "other", CONFIG)


def test_chosen_settings_are_made_once_and_kept(tmp_path):
    config = {"steps": 0, "optim": {"lr": 1.0}}
    run = runs.open_run(tmp_path / "r", "toy", config)
    assert run.choose(lambda: {"steps": 412}) == {"steps": 412}
    assert json.loads((run.workdir / "config.json").read_text()) == {"steps": 412, "optim": {"lr": 1.0}}
    assert runs.check_resume(run.workdir, "toy", config) == {"steps": 412}
    assert run.choose(lambda: {"steps": 999}) == {"steps": 412}
    with pytest.raises(UserError, match="steps was 412, now 500"):
        runs.check_resume(run.workdir, "toy", {"steps": 500, "optim": {"lr": 1.0}})


def test_a_directory_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run directory .* cannot be written: .* Give another --workdir"):
        runs.open_run(tmp_path / "file" / "r", "toy", CONFIG)


def test_a_second_process_is_refused(tmp_path):
    with runs.lock(tmp_path):
        again = runs.lock(tmp_path)
        with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on .* since "):
            again.__enter__()
    with runs.lock(tmp_path):
        pass


def test_a_full_disk_is_warned_about_and_training_goes_on(run, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("builtins.open", full)
    run.log(1, {"train/loss": 1.0})
    run.log(2, {"train/loss": 1.0})
    assert capsys.readouterr().err.count("No space left") == 1


def test_secrets_do_not_reach_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--token=hf_abcdefghijklmnop"])
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    config = {"api_key": "open sesame", "url": "https://me:pw@host/x", "eos_token": "<|end|>"}
    run = runs.open_run(tmp_path / "r", "toy", config)
    everything = "".join(path.read_text() for path in run.workdir.iterdir())
    assert "abcdefgh" not in everything and "open sesame" not in everything and "me:pw" not in everything
    assert "<|end|>" in everything
    runs.open_run(tmp_path / "r", "toy", config)  # and it can be resumed


def test_write_atomic_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_atomic(path, "old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError):
        files.write_atomic(path, "new")
    assert path.read_text() == "old"


def test_flatten_and_back():
    tree = {"a": {"b": {"c": 1}, "d": [1]}, "e": None}
    assert dict(files.flatten(tree)) == {"a.b.c": 1, "a.d": [1], "e": None}
    assert files.unflatten(dict(files.flatten(tree))) == tree


def test_latest_points_to_the_newest_run(tmp_path):
    for name in ("one", "two"):
        runs.open_run(tmp_path / "runs" / name, "toy", CONFIG)
    runs.open_run(tmp_path / "runs" / "two" / "stage", "toy", CONFIG, stage_of=tmp_path / "runs" / "two")
    assert (tmp_path / "runs" / "latest").resolve().name == "two"
