"""The loop: what it logs, evaluates and saves, where it begins, and how signals stop it."""

import itertools
import os
import signal
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from jaxllm.core.types import Mean, TrainState
from jaxllm.train import loop


def step_fn(state, frozen, batch, rng):
    total = state.params["sum"] + batch
    return TrainState(state.step + 1, {"sum": total}, ()), {"loss": Mean(jnp.float32(batch), jnp.float32(1))}


def start(step=0):
    return TrainState(jnp.int32(step), {"sum": jnp.float32(0)}, ())


def fit(batches=float, state=None, **settings):
    """(the last state, logs, steps evaluated, steps saved)."""
    logs, evaluated, saved = [], [], []
    settings = {"steps": 7, "log_every": 3, "eval_every": 5, "save_every": 2, **settings}
    try:
        last = loop.fit(
            step_fn, state or start(), {}, batches, None, log=lambda s, v: logs.append((s, v["loss"])),
            evaluate=lambda s, p: evaluated.append(s), save=lambda s: saved.append(int(s.step)), **settings,
        )  # fmt: skip
    except BaseException as error:
        last = error
    return last, logs, evaluated, saved


def test_every_step_sees_its_own_batch_and_logs_are_means_since_the_last():
    last, logs, evaluated, saved = fit()
    assert int(last.step) == 7 and float(last.params["sum"]) == sum(range(7))
    assert logs == [(1, 0.0), (3, 1.5), (6, 4.0), (7, 6.0)]
    assert evaluated == [5, 7] and saved == [2, 4, 6, 7]


def test_it_begins_at_the_step_of_the_state():
    seen = []
    last, logs, _, saved = fit(lambda i: seen.append(i) or float(i), start(4))
    assert seen == [4, 5, 6] and int(last.step) == 7 and saved == [6, 7]
    assert logs == [(6, 4.5), (7, 6.0)]


def test_a_finished_state_takes_no_step():
    last, logs, evaluated, _ = fit(state=start(7))
    assert int(last.step) == 7 and logs == [] and evaluated == []


def test_seconds_without_a_save_are_bounded():
    assert fit(save_every=0, save_seconds=0.0)[3] == [1, 2, 3, 4, 5, 6, 7]
    assert fit(save_every=0, save_seconds=1e9)[3] == [7]


def test_no_more_than_those_seconds_and_the_running_step_are_lost(monkeypatch):
    """By a clock that goes on by a second with each step: at every moment the last save is at most save_seconds + 1 old."""
    clock = itertools.count()
    now = [0.0]
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now[0]))
    saved = fit(lambda i: now.__setitem__(0, float(next(clock))) or float(i), steps=40, save_every=0, save_seconds=5.0)[3]
    assert saved[-1] == 40 and 5 <= max(b - a for a, b in itertools.pairwise([0, *saved])) <= 6


SIGNALS = pytest.mark.parametrize(("number", "kind"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])


@SIGNALS
def test_a_signal_in_the_last_step_stops_what_comes_behind_the_loop(number, kind):
    error, _, evaluated, saved = fit(lambda i: (os.kill(os.getpid(), number) if i == 6 else None) or float(i), save_every=0)
    assert isinstance(error, kind) and saved == [7] and evaluated == [5, 7]


@SIGNALS
def test_a_signal_in_the_last_save_waits_for_it(number, kind):
    finished = []

    def again(wait):
        if wait:
            os.kill(os.getpid(), number) if not finished else None
            finished.append(True)
        return False

    error, _, _, saved = fit(save_every=0, again=again)
    assert isinstance(error, kind) and saved == [7] and len(finished) == 2


@SIGNALS
def test_the_second_signal_does_not_wait(number, kind):
    def batches(i):
        for _ in range(2 if i == 2 else 0):
            os.kill(os.getpid(), number)
        return float(i)

    before = signal.getsignal(number)
    error, _, _, saved = fit(batches, save_every=0)
    assert isinstance(error, kind) and saved == [] and signal.getsignal(number) is before
    assert number == signal.SIGINT or error.code == 75


@SIGNALS
def test_a_signal_saves_at_the_next_boundary(number, kind):
    def batches(i):
        if i == 2:
            os.kill(os.getpid(), number)
        return float(i)

    before = signal.getsignal(number)
    error, _, _, saved = fit(batches, save_every=0)
    assert isinstance(error, kind) and saved == [3]
    assert number == signal.SIGINT or error.code == 75
    assert signal.getsignal(number) is before
