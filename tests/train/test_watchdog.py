"""The watchdog: a process that hangs leaves its stacks and ends with 75; one that works is left alone."""

import subprocess
import sys
import threading
import time

import pytest

from jaxllm.train import watchdog

HANG = """
import sys, threading, time
from pathlib import Path
from jaxllm.train.watchdog import watchdog

def a_function_that_hangs():
    time.sleep(60)

def another_thread():
    time.sleep(60)

threading.Thread(target=another_thread, daemon=True).start()
tell = print if len(sys.argv) < 4 else lambda text: time.sleep(60)
with watchdog(Path(sys.argv[1]), 0.3, process=int(sys.argv[2]), warn=tell) as enter:
    for _ in range(5):
        enter("data"); enter("step"); time.sleep(0.01)
    try:
        a_function_that_hangs()
    finally:
        print("never reached", flush=True)
"""


@pytest.mark.parametrize(("process", "name"), [(0, "stacks.txt"), (1, "stacks-1.txt")])
def test_a_hang_ends_with_75_and_the_stacks_of_all_threads(tmp_path, process, name):
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANG, str(tmp_path), str(process)], capture_output=True, text=True, timeout=50)
    assert done.returncode == 75 and time.monotonic() - began < 40
    stacks = (tmp_path / name).read_text()
    assert "a_function_that_hangs" in stacks and "another_thread" in stacks and "nothing happened for" in stacks
    assert "in `step`, the limit is 0 s" in stacks and name in done.stdout and "never reached" not in done.stdout


def test_a_disk_that_hangs_does_not_hang_the_watchdog(tmp_path):
    """What hangs may be what the stacks are written to."""
    source = HANG.replace("threading.Thread(target", "watchdog.__globals__['PATIENCE'] = 0.5\nthreading.Thread(target", 1)
    done = subprocess.run([sys.executable, "-c", source, str(tmp_path), "0", "hang"], capture_output=True, text=True, timeout=50)
    assert done.returncode == 75 and "a_function_that_hangs" in (tmp_path / "stacks.txt").read_text(), done.stderr


def test_seconds_of_one_part_are_not_counted_for_the_next(tmp_path, monkeypatch):
    """The thread looks while the loop comes to another part: between its reading of the clock and its reckoning."""
    ended, told = [], threading.Event()
    monkeypatch.setattr(watchdog, "_end", lambda *said: (ended.append(said), told.set()))
    real = watchdog.limit

    def slow(part, *more):
        found = real(part, *more)
        time.sleep(0.05)  # the loop goes on meanwhile
        return found

    monkeypatch.setattr(watchdog, "limit", slow)
    with watchdog.watchdog(tmp_path, 0.2) as enter:
        for _ in range(4):
            enter("data")
            enter("step")
        enter("save")
        time.sleep(1.0)  # it may take 1.5
        for _ in range(20):
            enter("step")
            time.sleep(0.02)
    assert not ended


def test_what_works_and_what_is_slow_at_first_is_left_alone(tmp_path):
    with watchdog.watchdog(tmp_path, 0.2) as enter:
        enter("first_step")
        time.sleep(0.5)  # compiling: 7.5 x least
        for _ in range(6):
            enter("data")
            enter("step")
            time.sleep(0.1)
    assert not list(tmp_path.iterdir())


def test_limits():
    limit = watchdog.limit
    assert limit("step", 120, [1.0, 1.0, 1.0], {}) == 120 and limit("step", 120, [50.0, 50.0, 9.0], {}) == 500
    assert limit("step", 120, [1.0], {}) == limit("first_step", 120, [1.0] * 9, {}) == limit("eval", 120, [], {}) == 900
    assert limit("eval", 120, [1.0] * 9, {"eval": 300.0}) == 3000


def test_nobody_looks_when_it_is_off(tmp_path):
    before = threading.active_count()
    with watchdog.watchdog(tmp_path, 0.0) as enter:
        enter("step")
        assert threading.active_count() <= before
