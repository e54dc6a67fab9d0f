"""Where a run may have to live: odd paths, no home, no terminal, little else. All at once, because each costs a process."""

import json
import os
import shutil
import stat
import subprocess
import sys
import time

import pytest

from experiments import pretrain
from jaxllm import launch
from tests.conftest import ROOT
from tests.experiments.conftest import TINY

# a mount namespace of its own: no /dev/shm, and a working directory that nobody can write
ALONE = "mount -t tmpfs -o ro,size=4k none /dev/shm && mount --bind -o ro . . && cd . && exec \"$@\""


def namespaces():
    """Whether this machine lets a test unmount things for itself."""
    if not shutil.which("unshare"):
        return False
    return subprocess.run(["unshare", "-rm", "sh", "-c", "mount -t tmpfs none /mnt"], capture_output=True).returncode == 0


def flags(given):
    return [f"--config.{name}={value}" for name, value in given.items()]


@pytest.mark.fault
def test_a_run_in_an_odd_place(files, tmp_path):
    place = tmp_path / "ein Verzeichnis für 日本"
    (place / "read only").mkdir(parents=True)
    data = shutil.copy(files["text"], place / "tëxt file.jsonl")
    environ = {
        "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "LANG": "C", "LC_ALL": "C", "COLUMNS": "40", "TERM": "xterm",
        "JAX_COMPILATION_CACHE_DIR": str(place / "no such place" / "cache"),
    }  # fmt: skip
    argv = [sys.executable, "-m", "experiments.pretrain", *flags({**TINY, "steps": 2, "data.path": data})]
    argv.append(f"--workdir={place / 'a run'}")
    alone = ["unshare", "-rm", "sh", "-c", ALONE, "sh"] if namespaces() else []
    old = os.umask(0o077)
    try:
        done = subprocess.run(
            [*alone, *argv], cwd=place / "read only", env=environ, capture_output=True, text=True, timeout=200, errors="replace",
            stdin=subprocess.DEVNULL, encoding="utf-8",
        )  # fmt: skip
    finally:
        os.umask(old)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    run = place / "a run"
    assert json.loads((run / "result.json").read_text())["experiment"] == "pretrain"
    assert stat.S_IMODE((run / "metrics.jsonl").stat().st_mode) == 0o600
    assert "\r" not in done.stdout and "\x1b" not in done.stdout, "plain lines where there is no terminal"
    assert list((place / "read only").iterdir()) == []
    again = subprocess.run(argv, cwd=place, env=environ, capture_output=True, text=True, timeout=100, encoding="utf-8")
    assert again.returncode == 0 and "is finished: nothing to do" in again.stdout, "the same command finds it again"


@pytest.mark.fault
def test_a_clock_that_jumps(files, tmp_path, monkeypatch):
    """Back by an hour at each look: nothing is timed by the wall clock, and steps stay in order."""
    begun, looks = time.time(), iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: begun - 3600.0 * next(looks))
    given = {**TINY, "steps": 4, "save_seconds": 1000.0, "data.path": files["text"]}
    launch.start(pretrain.main, "pretrain", given, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "train/loss" in row]
    assert steps == [1, 2, 3, 4] and all(row["time/step"] >= 0 for row in rows if "time/step" in row)
    assert (tmp_path / "run" / "report.html").exists()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()] == ["4"]


@pytest.mark.fault
def test_without_a_network_everything_local_works_and_names_fail_at_once(files, tmp_path):
    if not namespaces():
        pytest.skip("this system has no namespaces for a test")
    code = (
        "import time\nfrom jaxllm.convert import hub\nfrom jaxllm.core.types import UserError\nfrom jaxllm.data import text\n"
        f"assert len(text.read_rows({files['text']!r})) == 120\n"
        "for call in (lambda: text.read_rows('hf:owner/name'), lambda: hub.fetch('owner/name')):\n"
        "    began = time.monotonic()\n"
        "    try: call()\n"
        "    except UserError as error: print(error)\n"
        "    assert time.monotonic() - began < 10\n"
    )
    environ = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        ["unshare", "-rn", sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("offline, and not in the cache: pass a local path") == 2
