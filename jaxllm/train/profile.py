"""Where a run's time goes: the seconds of each part of the loop, its speed against the chip's peak, and traces of some steps."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jax

from jaxllm.core.types import Batch, Key, Mean, Params, TrainState, UserError
from jaxllm.train.step import Step

PARTS = ("data", "step", "eval", "save")
START = "start"  # of the time that is being measured


@dataclass(frozen=True)
class Stopwatch:
    """Seconds of a loop by part since they were last taken. `step` is what the other parts leave: no step is waited for.

    enter(part) hears of every part that begins, and of `step` when one has ended.
    """

    clock: Callable[[], float] = time.monotonic
    seconds: dict[str, float] = field(default_factory=dict)
    enter: Callable[[str], None] = lambda part: None

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count a block as a part."""
        begin = self.clock()
        self.seconds.setdefault(START, begin)
        self.enter(name)
        try:
            yield
        finally:
            self.enter("step")
            self.seconds[name] = self.seconds.get(name, 0.0) + self.clock() - begin

    def take(self) -> dict[str, float]:
        """{time/<part>: seconds} since the last call; they add up to all that has passed. first_step is there where it was."""
        now = self.clock()
        begin = self.seconds.pop(START, now)
        known = dict.fromkeys(PARTS, 0.0) | self.seconds
        known["step"] = now - begin - sum(known.values())
        self.seconds.clear()
        self.seconds[START] = now
        return {f"time/{name}": seconds for name, seconds in known.items()}


def rates(
    times: Mapping[str, float], steps: int, tokens: float, flops: float | None, devices: int, peak: float | None
) -> dict[str, float]:
    """Speed of `steps` steps of `tokens` tokens and `flops` FLOPs, evaluation and saving left out.

    {} for times with a first step, which compiles. perf/mfu = flops / (seconds devices peak), where the peak FLOP/s of one
    device is known; FLOPs as `models.flops` counts them.
    """
    seconds = times["time/data"] + times["time/step"]
    if "time/first_step" in times or not steps or seconds <= 0:
        return {}
    out = {"perf/tokens_per_second": tokens * steps / seconds} if tokens else {}
    if flops:
        each = flops * steps / seconds / devices
        out["perf/flops_per_second_per_device"] = each
        out |= {"perf/mfu": each / peak} if peak else {}
    return out


# ---- traces


def window(text: str, steps: int) -> tuple[int, int] | None:
    """(10, 15) of "10:15", the first and the last step to trace; None for "". UserError names the form or the run's steps."""
    if not text:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", text)
    first, last = map(int, found.groups()) if found else (0, 0)
    if not found or not 1 <= first <= last:
        raise UserError(f"config.profile={text!r}: give the first and the last step to trace, from 1, as in 10:15")
    if last > steps:
        least = max(1, steps - (last - first))
        raise UserError(f"config.profile={text!r}: the run has {steps} steps (config.steps): use {least}:{steps}")
    return first, last


@contextlib.contextmanager
def traced(
    step_fn: Step, steps: tuple[int, int] | None, done: int, directory: Path, note: Callable[[str], None] = print
) -> Iterator[Step]:
    """step_fn with a trace of the steps from steps[0] to steps[1], written to `directory`, also when one of them fails.

    done: how many steps the run has taken already; a step before the trace and its last one are waited for, no others.
    """
    if steps is None or done >= steps[1]:
        yield step_fn
        return
    number, running = done, False

    def stop() -> None:
        nonlocal running
        running = False
        jax.profiler.stop_trace()
        note(
            f"profile: steps {max(steps[0], done + 1)} to {number} in {directory}: "
            f"`xprof --logdir {directory}`, or open its *.trace.json.gz at ui.perfetto.dev"
        )

    def step(state: TrainState, frozen: Params, batch: Batch, rng: Key) -> tuple[TrainState, dict[str, Mean]]:
        nonlocal number, running
        number += 1
        if not steps[0] <= number <= steps[1]:
            return step_fn(state, frozen, batch, rng)
        if not running:
            jax.block_until_ready(state)
            jax.profiler.start_trace(directory)
            running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            out = step_fn(state, frozen, batch, rng)
        if number == steps[1]:
            jax.block_until_ready(out)
            stop()
        return out

    try:
        yield step
    finally:
        if running:
            stop()
