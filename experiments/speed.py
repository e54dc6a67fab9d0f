"""What every run says of its speed and of how its parameters lie on the mesh."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

from jaxllm.core import tree
from jaxllm.models import flops
from jaxllm.report import layout
from jaxllm.report.files import dump, read_jsonl, write_atomic
from jaxllm.train import chips, faults, profile
from jaxllm.train.compiled import programs

TIMED = ("time/", "perf/")
# columns whose every token is trained on once
SIDES = {"tokens": lambda c: [c], "chosen": lambda c: [c["chosen"], c["rejected"]]}


def step_flops(config: Any, columns: Any, batch_size: int, *, head: bool = True) -> float | None:
    """FLOPs of a train step on rows or pairs; None for other columns, whose sides are not all differentiated.

    head: whether the vocabulary's head is a part of it (a reward model and a classifier have another one).
    """
    name = next((name for name in SIDES if name in columns), None)
    if name is None:
        return None
    count = 0.0
    for side in SIDES[name](columns):
        length = side["tokens"].shape[-1]
        source = side.get("inputs")  # another text; of masked tokens, a column
        source = source["tokens"].shape[-1] if isinstance(source, dict) else None
        count += flops.train_flops(config, batch_size, length, source)
        count -= 0.0 if head else 6.0 * flops.head_parameters(config) * batch_size * length
    return count


def meter(
    run: Any, mesh: Any, model: Any, state: Any, frozen: Any, columns: Any, batch_size: int, tokens: float, *, whole: bool
) -> Callable[[int, dict[str, float]], dict[str, float]]:
    """add(step, values): the values of a log with perf/*; one line says how FLOPs are counted and against which peak.

    whole: the step is one program, a train step; of the steps of online RL, whose sampling has no formula here, and of roots that
    are frozen in part only tokens are counted.
    """
    count = None
    if whole and not state.params.keys() & frozen.keys():
        count = step_flops(model.config, columns, batch_size, head="policy" in state.params)
    device = mesh.devices.flat[0]
    chip = chips.of(device.device_kind)
    peak = chip.peak * chips.share(device, chip) if chip else None
    run.note(_convention(count, mesh.size, device.device_kind, peak))
    last, seen = int(state.step), len(programs())

    def add(step: int, values: dict[str, float]) -> dict[str, float]:
        nonlocal last, seen
        steps, last = step - last, step
        new, seen = len(programs()) - seen, len(programs())
        return values | profile.rates(values, steps, tokens, count, mesh.size, peak) | {"perf/programs_compiled": float(new)}

    return add


def _convention(count: float | None, devices: int, kind: str, peak: float | None) -> str:
    if count is None:
        return "speed: tokens a second only; no FLOPs are counted for sampling or for weights that are frozen in part"
    said = f"speed: {count:.3g} FLOPs a step: {flops.CONVENTION}"
    where = f"{devices} x {kind}"
    return f"{said}; MFU of {peak:.4g} FLOP/s x {where}" if peak else f"{said}; {where} has no data-sheet peak: no MFU"


def logger(
    run: Any, schedule: Callable, rates: Callable, line: Any, tokens: float, last: dict | None
) -> Callable[[int, dict[str, float]], None]:
    """log(step, values) for `loop.fit`: a line of metrics.jsonl, the live line, and `last`, which leaves times and speed out."""

    def log(step: int, values: dict[str, float]) -> None:
        named = {k if "/" in k else f"train/{k}": v for k, v in rates(step, values).items()}
        if last is not None:
            last.update({k: v for k, v in named.items() if not k.startswith(TIMED)})
        faults.point("before:log")
        run.log(step, {**named, "train/lr": float(schedule(step - 1))})
        faults.point("after:log")
        line.update(step, values.get("loss", 0.0), tokens)

    return log


def logged(run: Any, step: int, of: str = "") -> dict[str, float]:
    """What was logged of a step, as `logger` and evaluations had it, nan for what was not finite; {} where nothing was.

    The result of a run that was stopped behind its last step: started again it takes none, and measures nothing.
    """
    rows = [row for row in read_jsonl(run.workdir / "metrics.jsonl") if row["step"] == step]
    values = {name: math.nan if x is None else x for row in rows for name, x in row.items() if name.startswith(of)}
    return {name: x for name, x in values.items() if "/" in name and name != "train/lr" and not name.startswith(TIMED)}


def show_sharding(run: Any, mesh: Any, model: Any, state: Any, frozen: Any) -> None:
    """Print how the parameters and the optimizer lie on the mesh."""
    roots = state.params.keys() | frozen.keys()
    axes = {f"{root}/{path}": s.axes for root in roots for path, s in tree.flatten(model.specs).items()}
    run.note(layout.report(state.params, frozen, state.opt_state, mesh, axes))


def keep_times(run: Any, behind: dict[str, float]) -> None:
    """times.json: seconds of the whole run by part, those of metrics.jsonl and what came `behind` its last line."""
    logged = [row for row in read_jsonl(run.path("metrics.jsonl")) if "time/step" in row] if run.writes else []
    if not logged:
        return
    names = ["time/first_step", *(f"time/{part}" for part in profile.PARTS)]
    totals = {n: round(sum(row.get(n) or 0.0 for row in [*logged, behind]), 6) for n in names}
    with contextlib.suppress(OSError):  # a full disk: the run's own error says so
        write_atomic(run.path("times.json"), dump({**totals, "steps": logged[-1]["step"]}))
