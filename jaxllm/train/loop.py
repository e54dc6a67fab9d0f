"""The one loop: every stage of the life cycle runs through `fit`."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from jaxllm.core.types import Batch, Key, Mean, Params, TrainState
from jaxllm.train import faults, guard, signals
from jaxllm.train.processes import make_meet
from jaxllm.train.profile import Stopwatch
from jaxllm.train.step import Step, overlapping, settled


def fit(
    step_fn: Step, state: TrainState, frozen: Params, batches: Callable[[int], Batch], rng: Key, *, steps: int,
    log: Callable[[int, dict[str, float]], None], log_every: int = 10,
    evaluate: Callable[[int, Params], None] | None = None, eval_every: int = 0,
    save: Callable[[TrainState], None] | None = None, save_every: int = 0, save_seconds: float = 180.0,
    again: Callable[[bool], bool] = lambda wait: False, watch: Stopwatch | None = None, patience: int = 5,
) -> TrainState:  # fmt: skip
    """Run step_fn from state.step to `steps` and return the last state.

    batches(i) is the batch of step i on the devices; log(i, values) gets the means of the metrics since the last call, and the
    seconds of each part of the loop as time/*, for the first step and every log_every; watch, when given, keeps the seconds
    behind the last log; evaluate(i, params) runs every eval_every steps and at the end; save(state)
    every save_every steps or save_seconds seconds, when again() says that the last one has failed, and at the end. Metrics stay
    on the device between logs, so the host never waits for a step that it has just started. SIGTERM and Ctrl-C save at the next
    step boundary, then SystemExit(75) or KeyboardInterrupt is raised; a second signal does not wait. `patience` updates in a row
    that were not finite end it in the same way, with NonFinite, at the log that sees them. Several processes stop and save at
    the same step, whichever of them got the signal, and by the clock of process 0.
    """
    step, watch = int(state.step), watch or Stopwatch()
    begun, stop, streak = step, None, guard.Streak()
    pending: list[dict[str, Mean]] = []
    in_flight: collections.deque[Any] = collections.deque()
    depth = 1 if overlapping() else 0  # one step is queued behind the running one
    saving = _saving(save, save_every, save_seconds, again, step, watch)
    meet = make_meet(depth)
    faults.point("before:first_step")
    with signals.noted() as asked:
        while step < steps and streak.updates < patience:
            todo = meet(step, ({"stop": int(asked[0])} if asked else {}) | saving.wishes())
            if (stop := todo.get("stop")) is not None:
                break
            saving.at_boundary(step, state, "save" in todo)
            with watch.part("data"):
                batch = batches(step)
            with watch.part("first_step") if step == begun else contextlib.nullcontext():
                state, metrics = step_fn(state, frozen, batch, rng)
            faults.point("after:step")
            step += 1
            pending.append(metrics)
            in_flight.append(metrics)
            while len(in_flight) > depth:
                jax.block_until_ready(in_flight.popleft())
            if step == 1 or step % log_every == 0 or step == steps:
                host = jax.device_get(pending)  # the host waits here anyway: times are taken behind it
                log(step, fetch(host) | watch.take())
                streak = guard.follow(streak, step - len(host), host, patience)
                pending = []
            if evaluate and eval_every and (step % eval_every == 0 or step == steps):
                with watch.part("eval"):
                    faults.point("before:eval")
                    evaluate(step, state.params)
                    faults.point("after:eval")
        saving.at_end(step, state, steps)
        stop = asked[0] if asked else stop  # also one that came behind the last boundary: something else may come behind the loop
    if streak.updates >= patience:
        raise guard.NonFinite(*streak)
    if stop is not None:
        signals.end(stop)
    return state


class Saving(NamedTuple):
    """When checkpoints are made: wishes() of this process, at_boundary(step, state, agreed), at_end(step, state, steps)."""

    wishes: Callable[[], dict[str, bool]]
    at_boundary: Callable[[int, TrainState, bool], None]
    at_end: Callable[[int, TrainState, int], None]


def _saving(
    save: Callable[[TrainState], None] | None, every: int, seconds: float, again: Callable[[bool], bool], step: int,
    watch: Stopwatch,
) -> Saving:  # fmt: skip
    """The checkpoints of a loop that begins at `step`; none without `save`."""
    if save is None:
        return Saving(dict, lambda *_: None, lambda *_: None)
    saved, when = step, time.monotonic()

    def make(step: int, state: TrainState) -> None:
        nonlocal saved, when
        faults.point("before:save")
        with watch.part("save"):
            save(state)
        saved, when = step, time.monotonic()

    def wishes() -> dict[str, bool]:
        return {"save": True} if jax.process_index() == 0 and time.monotonic() - when >= seconds else {}

    def at_boundary(step: int, state: TrainState, agreed: bool) -> None:
        failed = again(False)  # asked before every step, so that a full disk is known as soon as Orbax knows it
        if step > saved and (failed or agreed or (every and step % every == 0)):
            make(step, state)

    def at_end(step: int, state: TrainState, steps: int) -> None:
        with watch.part("save"):
            failed = again(True)
        if failed or saved != step or steps == step:
            make(step, state)
            with watch.part("save"):
                failed = again(True)  # nothing comes behind it that could ask
            if failed:
                make(step, state)

    return Saving(wishes, at_boundary, at_end)


def fetch(pending: list[dict[str, Mean]]) -> dict[str, float]:
    """The pooled means of several steps' metrics, as floats: the only place where the host waits for metrics."""
    names = {name for metrics in pending for name in metrics}
    host = jax.device_get(pending)
    pooled = {n: _pool([m[n] for m in host if n in m]) for n in sorted(names)}
    return {name: float(value) for name, value in pooled.items()}


def _pool(means: list[Mean]) -> Any:
    total, count = sum(m.total for m in means), sum(m.count for m in means)
    return total / count if count else total


def evaluate_means(
    loss_fn: Callable[[Params, Batch], dict[str, Mean]], params: Params, batches: Iterator[Batch]
) -> dict[str, float]:
    """The pooled metrics of a jitted (params, batch) -> Means over some batches."""
    return fetch([settled(loss_fn(params, batch)) for batch in batches])
