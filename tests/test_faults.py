"""Killed at every named point, on full disks and beside peers that die or hang: a run ends with the bits of an undisturbed one.

Real processes, so not a part of the default tests: `python -m pytest -m fault`. scripts/soak.py does the same 200 times.
"""

import ast
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxllm.train import faults, manifest
from jaxllm.train.checkpoint import digest
from tests import test_processes as pair

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
SMALL = {
    "steps": 30, "save_every": 4, "batch_size": 8, "log_every": 1, "model.d_model": 32, "model.n_heads": 4, "model.d_ff": 64,
    "data.length": 32, "tokenizer": "byte",
}  # fmt: skip


# ---- the points themselves


def used():
    """{point: files} of all calls of faults.point with a constant."""
    found = {}
    for path in [*(ROOT / "jaxllm").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "faults.point":
                found.setdefault(ast.literal_eval(node.args[0]), []).append(path.name)
    return found


def test_every_point_of_the_table_is_somewhere_in_the_code_and_no_other():
    assert used().keys() == faults.POINTS.keys()
    assert set(faults.ONLINE) <= faults.POINTS.keys()


def test_every_line_of_the_contract_names_tests_that_are_there():
    rows = [line for line in (ROOT / "docs" / "runs.md").read_text().splitlines() if re.match(r"\| R\d ", line)]
    assert [row[2:4] for row in rows] == [f"R{i}" for i in range(1, 10)]
    sources = {str(p.relative_to(ROOT)): p.read_text() for folder in ("tests", "scripts") for p in (ROOT / folder).rglob("*.py")}
    for row in rows:
        named = re.findall(r"`((?:tests|scripts)[\w/.]*|test_\w+)`", row)
        assert named, row
        for name in named:
            assert any(f"def {name}(" in text for text in sources.values()) or (ROOT / name).exists(), name


@pytest.mark.parametrize("wrong", ["after:steps", "after:step@", "after:step@x", "after:step=stop", ""])
def test_a_point_that_is_not_there_is_refused(wrong):
    with pytest.raises(ValueError, match="JAXLLM_FAULT=.*give one of opened, "):
        faults.parse(wrong)
    assert faults.parse("after:step@3=hang") == ("after:step", 3, True) and faults.parse("opened") == ("opened", 1, False)


def test_a_point_ends_the_process_the_time_it_is_asked_to(tmp_path):
    source = (
        "from jaxllm.train import faults\ntry:\n    for i in range(5):\n        print(i, flush=True)\n"
        "        faults.point('after:log')\n        faults.point('after:step')\nfinally:\n    print('cleaned up')\n"
    )
    env = {**ENVIRONMENT, faults.KILL: "after:step@3", faults.TRACE: str(tmp_path / "trace")}
    done = subprocess.run([sys.executable, "-c", source], env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 137 and done.stdout == "0\n1\n2\n"
    assert [line.split()[1] for line in (tmp_path / "trace").read_text().splitlines()] == ["after:log", "after:step"] * 3


# ---- whole runs


def pretrain(workdir, text, **more):
    words = [f"--config.{k.replace('__', '.')}={v}" for k, v in {**SMALL, "data.path": text, **more}.items()]
    return [sys.executable, "-m", "experiments.pretrain", f"--workdir={workdir}", *words]


def run(command, fault="", limit=None, seconds=240):
    """The finished process of a command."""
    env = {**ENVIRONMENT, **({faults.KILL: fault} if fault else {})}
    before = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT, timeout=seconds, preexec_fn=before)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("faults") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} the cat sat on the mat and saw the moon"}) + "\n" for i in range(80)))
    return str(path)


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """The run directory of an undisturbed run."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    done = run(pretrain(workdir, text))
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.mark.fault
def test_killed_in_its_first_save_it_says_so_and_begins_again(text, whole, tmp_path):
    workdir = tmp_path / "run"
    assert run(pretrain(workdir, text), "mid:save").returncode == 137
    steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]  # the last step's metrics are there
    (workdir / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir(exist_ok=True)  # wherever Orbax was
    shutil.rmtree(workdir / "checkpoints" / "4", ignore_errors=True)
    done = run(pretrain(workdir, text))
    assert done.returncode == 0 and "first checkpoint was not complete" in done.stderr
    assert not list((workdir / "checkpoints").glob("*tmp*")) and digest(workdir) == digest(whole)
    assert pair.metric(workdir) == pair.metric(whole)


def passed(process, trace, name, seconds=200):
    """Wait until a process passes a point."""
    deadline = time.monotonic() + seconds
    while not (trace.exists() and f" {name}\n" in trace.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, name
        time.sleep(0.05)


@pytest.mark.fault
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_before_the_loop_ends_it_and_the_second_one_waits_for_no_save(text, whole, tmp_path, number, code):
    workdir = tmp_path / "run"
    for where, signals in (("opened", 1), ("mid:save", 2)):
        trace = tmp_path / where.replace(":", "-")
        env = {**ENVIRONMENT, faults.KILL: f"{where}=hang", faults.TRACE: str(trace)}
        process = subprocess.Popen(pretrain(workdir, text), env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        passed(process, trace, where)
        for i in range(signals):
            assert process.poll() is None, f"ended by signal {i}"
            process.send_signal(number)
            time.sleep(0.5)
        said = process.communicate(timeout=20)[1].decode()
        assert process.returncode == code and "ontinue with" in said and "Traceback" not in said, said
    assert run(pretrain(workdir, text)).returncode == 0 and digest(workdir) == digest(whole)


@pytest.mark.fault
@pytest.mark.parametrize("harm", ["flip", "truncate", "delete", "empty"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(text, whole, tmp_path, harm):
    workdir = tmp_path / "run"
    assert run(pretrain(workdir, text), "after:manifest@3").returncode == 137
    step = workdir / "checkpoints" / "12"
    file = max((p for p in (step / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = file.read_bytes()
    made = {"flip": bytes([content[0] ^ 1]) + content[1:], "truncate": content[:-1], "empty": b"", "delete": None}[harm]
    file.unlink()
    if made is not None:
        file.write_bytes(made)
    done = run(pretrain(workdir, text))
    assert done.returncode == 0 and "resumed at step 8 of 30" in done.stdout
    assert str(file.relative_to(step)) in done.stderr and "moved to 12.corrupt" in done.stderr
    assert digest(workdir) == digest(whole)


@pytest.mark.fault
def test_when_all_checkpoints_are_damaged_it_ends_with_74(text, tmp_path):
    workdir = tmp_path / "run"
    assert run(pretrain(workdir, text), "after:manifest@3").returncode == 137
    for step in manifest.steps_of(workdir / "checkpoints"):
        (workdir / "checkpoints" / str(step) / manifest.MANIFEST).write_text("{")
    for _ in range(2):  # and it does so again: it never begins at 0 by itself
        done = run(pretrain(workdir, text))
        assert done.returncode == 74 and "no usable checkpoint" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.fault
def test_two_processes_in_one_directory_the_second_is_told_who_holds_it(text, tmp_path):
    command = pretrain(tmp_path / "run", text, steps=100_000)
    first = subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        second = run(command)
        assert second.returncode == 2 and f"is in use by process {first.pid} on " in second.stderr
    finally:
        first.kill()
        first.wait()


# ---- disks


def traces(done):
    """The lines of tracebacks; tensorstore's own threads print some when the disk is full."""
    return "".join(line for line in done.stderr.splitlines() if line.lstrip().startswith("File "))


@pytest.mark.fault
def test_files_that_may_not_grow(text, whole, tmp_path):
    """RLIMIT_FSIZE stands for a full disk where no file system can be mounted: every checkpoint fails, and then 74."""
    workdir = tmp_path / "run"
    done = run(pretrain(workdir, text, save_every=12), limit=20_000)
    assert done.returncode == 74 and "jaxllm/" not in traces(done), done.stderr
    assert "could not be written (File too large)" in done.stderr and "TRAINING GOES ON" in done.stderr
    assert not [p.name for p in (workdir / "checkpoints").iterdir()]
    done = run(pretrain(workdir, text, save_every=4))
    assert done.returncode == 0 and digest(workdir) == digest(whole), done.stderr


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB; skips where none can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if not shutil.which("mount") or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]).returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(path):
    """Take what is left of a disk."""
    with open(path, "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass


@pytest.mark.fault
def test_a_full_disk_loses_nothing_that_was_saved(text, whole, small_disk):
    workdir = small_disk / "run"
    assert run(pretrain(workdir, text), "after:manifest@3").returncode == 137
    before = manifest.steps_of(workdir / "checkpoints")
    fill(small_disk / "filler")
    done = run(pretrain(workdir, text))
    assert done.returncode == 74 and "jaxllm/" not in traces(done), done.stderr
    assert "free under" in done.stderr and "Make room, then continue with" in done.stderr
    kept = manifest.steps_of(workdir / "checkpoints")
    assert kept and kept[-1] == before[-1] and manifest.damage(workdir / "checkpoints" / str(kept[-1])) is None
    (small_disk / "filler").unlink()
    done = run(pretrain(workdir, text))
    assert done.returncode == 0 and digest(workdir) == digest(whole), done.stderr


FULL_LOG = """
import sys
from jaxllm.report.run import open_run
run = open_run(sys.argv[1], "test", {})
with open(sys.argv[2], "wb", buffering=0) as filler:
    try:
        while filler.write(bytes(4096)):
            pass
    except OSError:
        pass
for step in range(2000):
    run.log(step, {"loss": 1.0})
print("trained on")
"""


@pytest.mark.fault
def test_a_log_that_cannot_be_written_is_one_warning(small_disk):
    command = [sys.executable, "-c", FULL_LOG, str(small_disk / "run"), str(small_disk / "filler")]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stdout.endswith("trained on\n")
    assert done.stderr.count("metrics.jsonl cannot be written") == 1 and "No space left" in done.stderr


# ---- surroundings


@pytest.mark.fault
def test_strange_surroundings(text, whole, tmp_path):
    """No home, no UTF-8, no terminal, 40 columns, a umask that shuts everybody out, and a path with spaces and accents."""
    workdir = tmp_path / "ein Verzeichnis für Läufe"
    shut = {k: v for k, v in ENVIRONMENT.items() if k not in ("HOME", "LANG", "JAX_COMPILATION_CACHE_DIR")}
    env = {**shut, "LC_ALL": "C", "COLUMNS": "40", "TERM": "dumb", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        pretrain(workdir, text), env=env, capture_output=True, cwd=ROOT, timeout=240, preexec_fn=lambda: os.umask(0o077)
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert b"\r" not in done.stdout and digest(workdir) == digest(whole)
    assert (workdir / "metrics.jsonl").stat().st_mode & 0o077 == 0


@pytest.mark.fault
def test_too_little_memory_is_a_message_not_a_hang(text, tmp_path):
    limit = 2 << 30
    command = pretrain(tmp_path / "run", text, batch_size=80, model__d_model=4096, model__d_ff=65536, model__n_layers=8)
    done = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, cwd=ROOT, timeout=240,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )  # fmt: skip
    assert done.returncode not in (0, 75), done.stdout
    assert done.stderr.strip(), "it must say something"


# ---- two processes


def told(text, tmp_path, name, **more):
    settings = {**pair.TINY, "data.path": text, "save_every": 3, "steps": 12}
    return {"stages": [["pretrain", str(tmp_path / name), settings]], "notes": str(tmp_path / f"{name}.rows"), **more}


@pytest.fixture(scope="module")
def whole_pair(text, tmp_path_factory):
    """The run directory of two undisturbed processes."""
    root = tmp_path_factory.mktemp("pair")
    codes, shown = pair.run(told(text, root, "run"))
    assert codes == [0, 0], shown
    return root / "run"


@pytest.mark.fault
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_peer_ends_the_other_and_both_go_on_to_the_same_bits(text, whole_pair, tmp_path, killed):
    began = time.monotonic()
    codes, shown = pair.run(told(text, tmp_path, "run", environment={str(killed): {faults.KILL: "after:step@8"}}))
    assert codes[killed] == 137 and codes[1 - killed] in (75, 134, -signal.SIGABRT), shown
    assert time.monotonic() - began < 120
    codes, shown = pair.run(told(text, tmp_path, "run"))
    assert codes == [0, 0] and "resumed at step" in shown[0], shown
    assert digest(tmp_path / "run") == digest(whole_pair)
    assert pair.metric(tmp_path / "run") == pair.metric(whole_pair)


@pytest.mark.fault
def test_a_stuck_peer_ends_in_stacks_and_75(text, whole_pair, tmp_path):
    stuck = told(text, tmp_path, "run", environment={"1": {faults.KILL: "after:step@8=hang"}})
    stuck["stages"][0][2]["watchdog"] = 4.0
    codes, shown = pair.run(stuck)
    assert codes == [75, 75], shown
    stacks = [(tmp_path / "run" / "crash" / name) for name in ("stacks.txt", "stacks-1.txt")]
    assert any(path.exists() for path in stacks), shown  # the first to end takes the other with it
    assert "jaxllm/train" in "".join(path.read_text() for path in stacks if path.exists())
    codes, shown = pair.run(told(text, tmp_path, "run"))
    assert codes == [0, 0], shown
    assert digest(tmp_path / "run") == digest(whole_pair)
