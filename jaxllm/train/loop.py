"""The one loop: every stage of the life cycle runs through `fit`."""

from __future__ import annotations

import collections
import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxllm.core.types import Batch, Key, Mean, Params, TrainState
from jaxllm.train.processes import make_meet
from jaxllm.train.profile import Stopwatch
from jaxllm.train.step import Step, overlapping, settled


def fit(
    step_fn: Step, state: TrainState, frozen: Params, batches: Callable[[int], Batch], rng: Key, *, steps: int,
    log: Callable[[int, dict[str, float]], None], log_every: int = 10,
    evaluate: Callable[[int, Params], None] | None = None, eval_every: int = 0,
    save: Callable[[TrainState], None] | None = None, save_every: int = 0, save_seconds: float = 180.0,
    watch: Stopwatch | None = None,
) -> TrainState:  # fmt: skip
    """Run step_fn from state.step to `steps` and return the last state.

    batches(i) is the batch of step i on the devices; log(i, values) gets the means of the metrics since the last call, and the
    seconds of each part of the loop as time/*, for the first step and every log_every; watch, when given, keeps the seconds
    behind the last log; evaluate(i, params) runs every eval_every steps and at the end; save(state)
    every save_every steps or save_seconds seconds, and at the end. Metrics stay on the device between logs, so the host
    never waits for a step that it has just started. SIGTERM and Ctrl-C save at the next step boundary, then SystemExit(75)
    or KeyboardInterrupt is raised; a second signal does not wait. Several processes stop and save at the same step, whichever of
    them got the signal, and by the clock of process 0.
    """
    step, watch = int(state.step), watch or Stopwatch()
    begun = step
    pending: list[dict[str, Mean]] = []
    in_flight: collections.deque[Any] = collections.deque()
    depth = 1 if overlapping() else 0  # one step is queued behind the running one
    saved_step, saved_time = step, time.monotonic()
    meet, first = make_meet(depth), jax.process_index() == 0
    stop: int | None = None
    with _stop_requests() as asked:
        while step < steps:
            late = save is not None and first and time.monotonic() - saved_time >= save_seconds
            todo = meet(step, ({"stop": int(asked[0])} if asked else {}) | ({"save": True} if late else {}))
            if (stop := todo.get("stop")) is not None:
                break
            if save and step > saved_step and ("save" in todo or (save_every and step % save_every == 0)):
                with watch.part("save"):
                    save(state)
                saved_step, saved_time = step, time.monotonic()
            with watch.part("data"):
                batch = batches(step)
            with watch.part("first_step") if step == begun else contextlib.nullcontext():
                state, metrics = step_fn(state, frozen, batch, rng)
            step += 1
            pending.append(metrics)
            in_flight.append(metrics)
            while len(in_flight) > depth:
                jax.block_until_ready(in_flight.popleft())
            if step == 1 or step % log_every == 0 or step == steps:
                values = fetch(pending)  # the host waits here anyway: times are taken behind it
                log(step, values | watch.take())
                pending = []
            if evaluate and eval_every and (step % eval_every == 0 or step == steps):
                with watch.part("eval"):
                    evaluate(step, state.params)
    if save and (saved_step != step or steps == step):
        with watch.part("save"):
            save(state)
    if stop is not None:
        if stop == signal.SIGTERM:
            raise SystemExit(75)  # preempted: the same command continues
        raise KeyboardInterrupt(f"stopped and saved at step {step} of {steps}")
    return state


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


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """A list that SIGTERM or the first Ctrl-C makes non-empty; the second Ctrl-C raises. A no-op off the main thread."""
    requests: list[int] = []

    def handler(number: int, frame: Any) -> None:
        if requests:
            raise KeyboardInterrupt
        requests.append(number)

    try:
        old = {s: signal.signal(s, handler) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread
        old = {}
    try:
        yield requests
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
