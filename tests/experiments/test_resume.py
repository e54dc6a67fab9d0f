"""Killed in mid-run and started again with the same command, a run ends with the bits of an uninterrupted one."""

import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments import common, ppo, reward
from jaxllm import launch
from jaxllm.train.checkpoint import restore_params


def digest(workdir):
    """SHA-256 over the newest checkpoint's parameters."""
    params, meta = restore_params(workdir)
    h = hashlib.sha256(str(meta["step"]).encode())
    for leaf in jax.tree.leaves(params):
        h.update(np.ascontiguousarray(leaf).tobytes())
    return h.hexdigest()


def command(workdir, text):
    settings = {
        "steps": 120, "save_every": 5, "batch_size": 8, "log_every": 1, "model.d_model": 32, "model.n_heads": 4, "model.d_ff": 64,
        "data.path": text, "data.length": 32, "tokenizer": "byte",
    }  # fmt: skip
    words = [f"--config.{k}={v}" for k, v in settings.items()]
    return [sys.executable, "-m", "experiments.pretrain", f"--workdir={workdir}", *words]


def environment():
    env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    return env


def test_sigkill_then_the_same_command_gives_the_same_bits(files, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole, files["text"]), env=environment(), check=True, capture_output=True, timeout=240)
    process = subprocess.Popen(
        command(killed, files["text"]), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 200
    while process.poll() is None and time.time() < deadline:
        lines = (killed / "metrics.jsonl").read_text().count("\n") if (killed / "metrics.jsonl").exists() else 0
        if lines >= 23:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    process.wait()
    assert process.returncode == -signal.SIGKILL and not (killed / "result.json").exists()
    again = subprocess.run(
        command(killed, files["text"]), env=environment(), check=True, capture_output=True, timeout=240, text=True
    )
    assert "resumed at step" in again.stdout
    assert digest(whole) == digest(killed)
    losses = [
        [(m["step"], m["train/loss"]) for m in map(json.loads, (d / "metrics.jsonl").open()) if "train/loss" in m]
        for d in (whole, killed)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward"])
def test_stopped_behind_its_last_step_a_run_still_has_its_result(stage, base, files, tmp_path, monkeypatch):
    """Saved, but without a result: started again it takes no step, and says what it would have said."""
    main = importlib.import_module(f"experiments.{stage}").main
    path = files["chat" if stage == "sft" else "pairs"]
    given = {"steps": 2, "batch_size": 8, "init": str(base), "data.path": path, "data.length": 32, "log_every": 1}
    kept = dict(given, gates=False)

    def stop(name):
        if name == "before:result":
            raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(common.faults, "point", stop)
        with pytest.raises(Stopped):
            launch.start(main, stage, kept, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    resumed = launch.start(main, stage, kept, tmp_path / "run")["metrics"]
    whole = launch.start(main, stage, kept, tmp_path / "whole")["metrics"]
    assert resumed == whole and len(whole) > 1
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


class Stopped(Exception):
    """Stands for a kill inside the process."""


@pytest.fixture
def ppo_overrides(base, files):
    pairs = {"steps": 2, "batch_size": 8, "init": str(base), "data.path": files["pairs"], "data.length": 32}
    launch.start(reward.main, "reward", pairs, base / "reward-resume")
    return {
        "steps": 4, "save_every": 2, "batch_size": 8, "init": str(base), "reward_model": str(base / "reward-resume"),
        "data.path": files["prompts"], "max_prompt": 20, "max_new_tokens": 8,
    }  # fmt: skip


def test_ppo_stopped_between_rollouts_gives_the_same_bits(ppo_overrides, tmp_path, monkeypatch):
    launch.start(ppo.main, "ppo", ppo_overrides, tmp_path / "whole")
    from jaxllm.train import loop

    real = loop.fetch
    calls = []

    def stop_after_three(pending):
        calls.append(1)
        if len(calls) == 4:
            raise Stopped
        return real(pending)

    monkeypatch.setattr(loop, "fetch", stop_after_three)
    with pytest.raises(Stopped):
        launch.start(ppo.main, "ppo", ppo_overrides, tmp_path / "stopped")
    monkeypatch.setattr(loop, "fetch", real)
    launch.start(ppo.main, "ppo", ppo_overrides, tmp_path / "stopped")
    assert digest(tmp_path / "whole") == digest(tmp_path / "stopped")
