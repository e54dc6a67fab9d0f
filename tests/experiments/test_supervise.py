"""The supervisor: what it restarts, when it gives up, and how signals reach the command."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import supervise

ROOT = Path(__file__).resolve().parents[2]
# ends with the next of the codes in sys.argv[2], and leaves a checkpoint's directory where the code has a +
CHILD = """
import os, signal, sys
from pathlib import Path
root = Path(sys.argv[1].partition("=")[2])
tries = len(list(root.glob("try*")))
(root / f"try{tries}").touch()
word = sys.argv[2].split(",")[tries]
if word.endswith("+"):
    (root / "checkpoints" / str(tries)).mkdir(parents=True)
code = int(word.rstrip("+"))
if code < 0:
    os.kill(os.getpid(), -code)
    signal.pause()
sys.exit(code)
"""


def run(tmp_path, codes, restarts=2):
    """(its code, how often the command was started, the pauses, what it said)."""
    pauses, said = [], []
    command = [sys.executable, "-c", CHILD, f"--workdir={tmp_path}", codes]
    code = supervise.supervise(command, tmp_path, restarts, sleep=pauses.append, say=said.append)
    return code, len(list(tmp_path.glob("try*"))), pauses, said


@pytest.mark.parametrize("code", [0, 2, 70, 74, 130])
def test_what_a_restart_does_not_cure_ends_it_with_that_code(tmp_path, code):
    assert run(tmp_path, str(code)) == (code, 1, [], [])


def test_it_starts_again_and_ends_with_the_last_code(tmp_path):
    code, tries, pauses, said = run(tmp_path, "75,137,134,-9,-6,0", restarts=9)
    assert (code, tries) == (0, 6) and pauses == [2, 4, 8, 16, 32] and "code 137" in said[1] and "code 134" in said[4]


def test_it_gives_up_when_nothing_new_is_saved(tmp_path):
    code, tries, _, said = run(tmp_path, "75,75,75,75,75")
    assert (code, tries) == (75, 3) and "no new checkpoint in 2 restarts: giving up" in said[-1]


def test_a_new_checkpoint_begins_the_count_again(tmp_path):
    code, tries, pauses, _ = run(tmp_path, "75,75,-9+,75,75+,75,0")
    assert (code, tries) == (0, 7) and pauses == [2, 4, 1, 2, 1, 2]


WAITS = """
import signal, sys, time
def stop(number, frame):
    print(f"got {number}", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_handed_on_once_and_ends_it(tmp_path, number):
    command = [sys.executable, "-m", "experiments.supervise", "--", sys.executable, "-c", WAITS, f"--workdir={tmp_path}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.stdout.readline() == "ready\n"
    began = time.monotonic()
    process.send_signal(number)
    assert process.stdout.read() == f"got {int(number)}\n" and process.wait(30) == 75 and time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["python", "x"], "after --"),
        (["--"], "no command"),
        (["--", "python", "x"], "--workdir=DIR"),
        (["--restart=3", "--", "python", "--workdir=x"], "unknown argument '--restart=3'"),
    ],
)
def test_what_is_missing_is_said(argv, says, capsys):
    assert supervise.main(argv) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_arguments():
    command = ["python", "-m", "experiments.pretrain", "--workdir=runs/a", "--config.steps=3"]
    assert supervise.parse(["--restarts=7", "--", *command]) == (command, Path("runs/a"), 7)
    assert supervise.parse(["--", "x", "--workdir", "runs/b"])[1] == Path("runs/b")
