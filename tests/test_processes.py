"""Several processes on the loopback: the same run as one, no row lost or repeated, stopped and continued by another number."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import common, dpo, grpo, pretrain, sft
from jaxllm import exits, launch
from jaxllm.core import sharding
from jaxllm.core.types import UserError
from jaxllm.train import processes
from jaxllm.train.checkpoint import restore_params
from tests import processes_child

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 300  # at most; about 20 s on two idle cores
MESH = {"mesh.data": 2, "mesh.fsdp": 2}
WORDS = [
    "the", "cat", "sat", "on", "a", "mat", "and", "saw", "no", "moon", "rise", "far", "over", "some", "old", "town", "by", "sea",
]  # fmt: skip
TINY = {
    "steps": 8, "batch_size": 8, "log_every": 1, "data.length": 16, "tokenizer": "byte", "model.d_model": 16, "model.n_heads": 2,
    "model.d_ff": 32, "model.n_layers": 1, "model.max_length": 64, "optim.warmup": 2, "data.held_out": 0.3,
    **MESH,
}  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file whose packed rows all differ, fewer than 8 batches hold."""
    rows = [{"text": f"{i} {WORDS[i % 18]}"} for i in range(80)]
    return write(tmp_path_factory.mktemp("processes") / "text.jsonl", rows)


def started(told, count, devices):
    """The processes of a run, and where their output goes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    told = {**told, "coordinator": f"127.0.0.1:{port}", "processes": count}
    env = {
        k: v for k, v in os.environ.items() if not k.startswith(("JAX_COORD", "JAX_NUM_PROC", "JAX_PROCESS", "SLURM_", "OMPI_"))
    }
    env |= {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.processes_child", json.dumps(told)]
    outputs = [Path(f"{told['notes']}.{i}.log") for i in range(count)]
    return [
        subprocess.Popen([*command, str(i)], env=env, cwd=ROOT, stdout=out.open("w"), stderr=subprocess.STDOUT)
        for i, out in enumerate(outputs)
    ], outputs


def ended(children, outputs, seconds=SECONDS):
    """([exit codes], [outputs]) of processes that are killed when the time is over."""
    deadline = time.monotonic() + seconds
    try:
        codes = [p.wait(max(0.1, deadline - time.monotonic())) for p in children]
    except subprocess.TimeoutExpired:
        raise AssertionError("\n".join(["too slow", *(o.read_text()[-3000:] for o in outputs)])) from None
    finally:
        for p in children:
            p.kill()
            p.wait()
    return codes, [o.read_text() for o in outputs]


def run(told, count=2):
    """Four devices over so many processes."""
    return ended(*started(told, count, 4 // count))


def notes(path, count):
    """{step: the rows of the whole batch}, those of process 0 first."""
    found = {}
    for index in range(count):
        for step, rows in map(json.loads, Path(f"{path}.{index}").read_text().splitlines()):
            found.setdefault(step, []).extend(rows)
    return found


def metric(workdir, name="train/loss"):
    rows = map(json.loads, (Path(workdir) / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row[name] for row in rows if name in row}


def close(a, b, tolerance=1e-5):
    assert a.keys() == b.keys() and a
    np.testing.assert_allclose([a[s] for s in sorted(a)], [b[s] for s in sorted(a)], rtol=0, atol=tolerance)


def same_params(a, b, tolerance=2e-4):
    """Adam divides by the size of a gradient: where that is near 0, rounding decides the direction of a step of lr = 3e-3."""
    (x, _), (y, _) = restore_params(a), restore_params(b)
    apart = [np.abs(np.asarray(p) - np.asarray(q)) for p, q in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)]
    assert max(d.max() for d in apart) < tolerance


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """The uninterrupted run of one process: (run directory, where its rows are noted, the settings)."""
    root = tmp_path_factory.mktemp("whole")
    settings = {**TINY, "data.path": text}
    common.make_loader = processes_child.recording(root / "rows.0")
    try:
        launch.start(pretrain.main, "pretrain", settings, root / "run")
    finally:
        common.make_loader = processes_child.make_loader
    return root / "run", root / "rows", settings


def test_two_processes_then_one_read_and_end_as_one_does(whole, tmp_path, monkeypatch):
    alone, rows, settings = whole
    told = {"stages": [["pretrain", str(tmp_path / "run"), settings]], "notes": str(tmp_path / "rows"), "stop_at": {"1": 3}}
    codes, shown = run(told)
    assert codes == [75, 75], shown  # only process 1 was told to stop
    assert "pretrain 1/8" in shown[0] and "pretrain 1/8" not in shown[1]  # one of them prints
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()) == ["5"]
    monkeypatch.setattr(common, "make_loader", processes_child.recording(tmp_path / "after.0"))
    launch.start(pretrain.main, "pretrain", settings, tmp_path / "run")
    assert "resumed at step 5 of 8" in (tmp_path / "run" / "log.txt").read_text()
    close(metric(alone), metric(tmp_path / "run"))
    close(metric(alone, "eval/loss"), metric(tmp_path / "run", "eval/loss"))
    same_params(alone, tmp_path / "run")
    seen, expected = notes(tmp_path / "rows", 2) | notes(tmp_path / "after", 1), notes(rows, 1)
    assert seen == expected and list(seen) == list(range(8))
    order = [row for step in range(8) for row in seen[step]]
    epoch = len(set(order))
    assert len(order) > epoch > 8 and len(set(order[:epoch])) == epoch  # each row once before any comes again


@pytest.mark.slow
def test_one_process_then_two(whole, tmp_path, monkeypatch):
    alone, rows, settings = whole
    told = {"stages": [["pretrain", str(tmp_path / "run"), settings]], "notes": str(tmp_path / "rows")}
    codes, shown = run({**told, "stop_at": {"0": 2}}, 1)
    assert codes == [75], shown
    Path(f"{told['notes']}.0").rename(tmp_path / "before.0")
    codes, shown = run(told, 2)
    assert codes == [0, 0] and "resumed at step 3 of 8" in shown[0], shown
    close(metric(alone), metric(tmp_path / "run"))
    same_params(alone, tmp_path / "run")
    assert notes(tmp_path / "before", 1) | notes(told["notes"], 2) == notes(rows, 1)


@pytest.mark.slow
def test_preferences_and_online_rl_on_two_processes(whole, tmp_path):
    alone, _, _ = whole
    pairs = [{"prompt": f"say {w}", "chosen": w, "rejected": w[::-1] + " no"} for w in WORDS]
    chats = write(tmp_path / "chat.jsonl", [{"prompt": p["prompt"], "completion": p["chosen"]} for p in pairs])
    asked = write(tmp_path / "asked.jsonl", [{"prompt": p["prompt"], "answer": p["chosen"]} for p in pairs])
    shared = {"batch_size": 8, "log_every": 1, **MESH}
    launch.start(
        sft.main, "sft", {**shared, "steps": 2, "data.path": chats, "data.length": 32, "init": str(alone)}, tmp_path / "sft"
    )
    start = {**shared, "init": str(tmp_path / "sft")}
    offline = {**start, "steps": 3, "data.path": write(tmp_path / "pairs.jsonl", pairs), "data.length": 32}
    online = {**start, "steps": 2, "group": 2, "max_new_tokens": 6, "rewards": "length:3 + repetition", "data.path": asked}
    stages = [["dpo", str(tmp_path / "dpo2"), offline], ["grpo", str(tmp_path / "grpo2"), online]]
    codes, shown = run({"stages": stages, "notes": str(tmp_path / "rows")})
    assert codes == [0, 0], shown
    launch.start(dpo.main, "dpo", offline, tmp_path / "dpo1")
    close(metric(tmp_path / "dpo1"), metric(tmp_path / "dpo2"))
    same_params(tmp_path / "dpo1", tmp_path / "dpo2")
    launch.start(grpo.main, "grpo", online, tmp_path / "grpo1")
    for name in ("train/reward", "train/entropy", "train/loss"):
        close(metric(tmp_path / "grpo1", name), metric(tmp_path / "grpo2", name))


@pytest.mark.fault
def test_processes_that_do_not_run_the_same_are_refused(text, tmp_path):
    settings = {**TINY, "data.path": text}
    told = {"stages": [["pretrain", str(tmp_path / "run"), settings]], "notes": str(tmp_path / "rows")}
    codes, shown = run({**told, "own": {"1": {"optim.lr": 1e-4}}})
    assert codes == [2, 2], shown
    for output in shown:
        assert "error: process 1 and process 0 do not run the same: config.optim.lr differs" in output, output


@pytest.mark.fault
def test_a_lost_process_ends_the_others_with_a_code_that_says_restart(text, tmp_path):
    settings = {**TINY, "steps": 100_000, "data.path": text}
    told = {"stages": [["pretrain", str(tmp_path / "run"), settings]], "notes": str(tmp_path / "rows")}
    children, outputs = started(told, 2, 2)
    log, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + SECONDS
    while not log.exists() and all(p.poll() is None for p in children) and time.monotonic() < deadline:
        time.sleep(0.2)
    children[1].send_signal(signal.SIGKILL)
    codes, shown = ended(children, outputs)
    assert codes[1] == -signal.SIGKILL and codes[0] in (75, -signal.SIGABRT), shown
    assert codes[0] != 75 or "another process of this run was lost" in shown[0]


class Device:
    """Stands for a device of another process."""

    platform = "cpu"

    def __init__(self, process):
        self.process_index = process


def mesh_of(order, **sizes):
    """A mesh over devices whose processes are `order`."""
    grid = np.array([Device(p) for p in order], object).reshape([sizes.get(a, 1) for a in sharding.AXES])
    return type("Mesh", (), {"devices": grid, "shape": {a: sizes.get(a, 1) for a in sharding.AXES}})


def test_rows_go_to_processes():
    assert sharding.process_rows(mesh_of([0, 0, 1, 1], data=2, fsdp=2)) == (0, 2)
    assert sharding.process_rows(mesh_of([1, 1, 0, 0], data=4)) == (1, 2)
    assert sharding.process_rows(mesh_of([0, 1, 0, 1], data=2, tensor=2)) == (0, 1)  # both hold all rows
    with pytest.raises(UserError, match="put `data` or `fsdp` over the processes"):
        sharding.process_rows(mesh_of([0, 1, 1, 0], data=4))


def test_the_noted_rows_are_numbers_of_their_tokens():
    tokens = np.arange(6, dtype=np.int32).reshape(2, 3)
    assert processes_child.rows_of({"tokens": tokens}) == [zlib.crc32(tokens[0]), zlib.crc32(tokens[1])]


def test_alone_nothing_is_asked_of_anyone():
    meet = processes.make_meet(1)
    assert meet(3, {"stop": 15}) == {"stop": 15} and meet(4, {}) == {}
    assert processes.from_first(lambda: {"a": 1}) == {"a": 1} and processes.together(close) is close
    assert processes.on_host({"x": jax.numpy.ones(2)})["x"].tolist() == [1.0, 1.0]
    processes.barrier()
    processes.check_same({"config.seed": 1})
    with pytest.raises(UserError, match="wrong"):
        processes.first_only(refuse)


@pytest.mark.parametrize(
    ("error", "code"), [(UserError("no"), 2), (OSError(28, "it needs 3 GB"), 74)], ids=["bad input", "a full disk"]
)
def test_what_stops_the_first_process_stops_all_with_its_code(monkeypatch, error, code):
    """Otherwise they would wait for it until it is missed, and end with a code that says restart."""
    store, index = {}, [0]

    class Client:
        key_value_set = staticmethod(store.__setitem__)
        blocking_key_value_get = staticmethod(lambda key, ms: store[key])

    monkeypatch.setattr(processes, "alone", lambda: False)
    monkeypatch.setattr(processes, "_client", Client)
    monkeypatch.setattr(processes, "_name", lambda kind: kind)
    monkeypatch.setattr(processes.jax, "process_index", lambda: index[0])

    def work():
        raise error

    for index[0] in range(2):
        assert exits.guard(lambda: processes.first_only(work), None, "again") == code


def refuse():
    raise UserError("wrong")
