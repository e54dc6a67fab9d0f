"""Times by part, speed, and traces of a window of steps."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from jaxllm.core.types import Mean, TrainState, UserError
from jaxllm.train import loop, profile


@jax.jit
def step_fn(state, frozen, batch, rng):
    return TrainState(state.step + 1, {"sum": state.params["sum"] + batch}, ()), {"loss": Mean(batch, jnp.float32(1))}


def start(step=0):
    return TrainState(jnp.int32(step), {"sum": jnp.float32(0)}, ())


class Clock:
    """A clock that stands still unless it is told to go on."""

    now = 100.0

    def __call__(self):
        return self.now


def run(clock, state, **settings):
    """(logs, the stopwatch) of a loop in which a batch takes 1 s, a step 10 (the first 100), evaluation 1000, saving 10000."""
    watch, logs, first = profile.Stopwatch(clock), [], int(state.step)

    def go(seconds):
        clock.now += seconds

    def slow(*args):
        go(100 if int(args[0].step) == first else 10)
        return step_fn(*args)

    loop.fit(
        slow, state, {}, lambda i: go(1) or jnp.float32(i), None, log=lambda s, v: logs.append((s, v)),
        evaluate=lambda s, p: go(1000), save=lambda s: go(10000), watch=watch, save_seconds=1e9, **settings,
    )  # fmt: skip
    return logs, watch


def times(first=None, **parts):
    out = {f"time/{name}": float(parts.get(name, 0)) for name in profile.PARTS}
    return out | ({} if first is None else {"time/first_step": float(first)})


def only_times(values):
    return {n: v for n, v in values.items() if n.startswith("time/")}


def test_every_second_is_counted_once_under_its_part():
    logs, watch = run(Clock(), start(), steps=7, log_every=3, eval_every=5, save_every=2)
    assert [(s, only_times(v)) for s, v in logs] == [
        (1, times(first=100, data=1)),
        (3, times(data=2, step=20, save=10000)),
        (6, times(data=3, step=30, eval=1000, save=10000)),
        (7, times(data=1, step=10, save=10000)),
    ]
    assert watch.take() == times(eval=1000, save=10000), "what comes behind the last log is kept"
    assert watch.take() == times()


def test_a_resumed_run_has_a_first_step_too():
    logs, _ = run(Clock(), start(4), steps=8, log_every=3)
    assert [(s, only_times(v)) for s, v in logs] == [(6, times(first=100, data=2, step=10)), (8, times(data=2, step=20))]


def test_a_part_that_fails_is_counted():
    clock = Clock()
    watch = profile.Stopwatch(clock)
    with pytest.raises(OSError), watch.part("save"):
        clock.now += 3
        raise OSError
    assert watch.take() == times(save=3)


def test_rates_by_hand():
    seconds = times(data=1, step=4, eval=50, save=50)
    assert profile.rates(seconds, 10, 64, 1e9, 2, 4e9) == {
        "perf/tokens_per_second": 128.0, "perf/flops_per_second_per_device": 1e9, "perf/mfu": 0.25
    }  # fmt: skip
    assert profile.rates(seconds, 10, 64, 1e9, 2, None).keys() == {"perf/tokens_per_second", "perf/flops_per_second_per_device"}
    assert profile.rates(seconds, 10, 64, None, 2, 4e9) == {"perf/tokens_per_second": 128.0}
    assert profile.rates(seconds | {"time/first_step": 9.0}, 10, 64, 1e9, 2, 4e9) == {}, "compilation is no speed"
    assert profile.rates(times(), 0, 64, 1e9, 2, 4e9) == {}


# ---- traces


def test_windows():
    assert profile.window("", 5) is None and profile.window("2:3", 5) == (2, 3) and profile.window("5:5", 5) == (5, 5)


@pytest.mark.parametrize(
    "text,said",
    [
        ("10", "config.profile='10': give the first and the last step to trace, from 1, as in 10:15"),
        ("3:2", "config.profile='3:2': give the first"), ("0:2", "from 1"), ("a:b", "as in 10:15"), ("2:-1", "as in 10:15"),
        ("10:15", r"config.profile='10:15': the run has 12 steps \(config.steps\): use 7:12"),
        ("10:50", r"use 1:12"),
    ],
)  # fmt: skip
def test_windows_that_cannot_be(text, said):
    with pytest.raises(UserError, match=said):
        profile.window(text, 12)


def trace_of(directory):
    (file,) = directory.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return sorted(int(e["args"]["step_num"]) for e in events if e.get("name") == "train")


def walk(directory, window, done, steps, fails=0):
    """The notes of steps done + 1 to `steps`, of which number `fails` raises."""
    notes = []

    def step(state, frozen, batch, rng):
        if int(state.step) + 1 == fails:
            raise OSError
        return step_fn(state, frozen, batch, rng)

    state = start(done)
    with profile.traced(step, window, done, directory, notes.append) as stepped:
        for _ in range(done, steps):
            state, _ = stepped(state, {}, jnp.float32(1), None)
    assert int(state.step) == steps
    return notes


@pytest.mark.parametrize("window,done,seen", [((2, 3), 0, [2, 3]), ((2, 4), 2, [3, 4])])
def test_a_trace_has_the_steps_that_were_asked_for(tmp_path, window, done, seen):
    (note,) = walk(tmp_path, window, done, 5)
    assert f"steps {seen[0]} to {seen[-1]} in {tmp_path}" in note
    assert trace_of(tmp_path) == seen


def test_a_step_that_fails_ends_the_trace(tmp_path):
    with pytest.raises(OSError):
        walk(tmp_path, (2, 5), 0, 5, fails=3)
    assert 2 in trace_of(tmp_path)
    (note,) = walk(tmp_path / "again", (1, 1), 0, 2)  # the profiler is free again
    assert "steps 1 to 1" in note


def test_without_a_window_the_step_is_left_alone(tmp_path):
    for window, done in ((None, 0), ((1, 2), 2)):
        with profile.traced(step_fn, window, done, tmp_path) as step:
            assert step is step_fn
