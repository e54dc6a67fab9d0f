"""A plan as text and as JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from experiments.plan import cost, hlo
from experiments.plan.machine import Machine
from experiments.plan.plan import HEADROOM, Plan
from jaxllm.core import spec
from jaxllm.models import flops
from jaxllm.report.console import say

GIB = 2**30


def gib(size: float) -> str:
    return f"{size / GIB:8.3f} GiB" if size >= GIB / 64 or not size else f"{size / 2**20:8.3f} MiB"


def bar(size: float, whole: float, width: int = 40) -> str:
    """How full the memory is."""
    filled = min(width, round(width * size / whole))
    return f"[{'#' * filled}{'.' * (width - filled)}] {size / whole:.0%} of {whole / GIB:.1f} GiB"


def memory_rows(plan: Plan) -> list[tuple[str, float]]:
    """(what, bytes of one device), the peak last."""
    known = [(name, size) for name, size in plan.shares.items() if size]
    state = sum(size for name, size in known if name != "beside the step")
    step = plan.program.peak
    rows = [*known, ("activations and temporaries of the step", max(0.0, step - state))]
    rows.append(("peak of the step", step + plan.shares["beside the step"]))
    if plan.rollout:
        rows.append(("rollout: caches and temporaries", max(0.0, plan.rollout.peak - plan.rollout.arguments)))
        rows.append(("peak of step and rollout", plan.peak))
    return rows


def show(plan: Plan, machine: Machine) -> None:
    """The whole plan on the console."""
    stage, mesh = plan.stage, ", ".join(f"{axis}={n}" for axis, n in plan.sizes.items() if n > 1) or "one device"
    count = sum(spec.count(specs) for specs in stage.specs.values())
    say(f"\n{count:,} parameters on {machine.name} ({len(machine.devices)} devices): {mesh}; {plan.tokens:,} tokens a step")
    for note in plan.notes:
        say(f"  note: {note}")
    seconds = plan.program.seconds + (plan.rollout.seconds if plan.rollout else 0.0)
    say(f"\nMemory of one device (compiled in {seconds:.0f} s)")
    for name, size in memory_rows(plan):
        say(f"  {name:<42}{gib(size)}")
    if machine.memory:
        say(f"  {bar(plan.peak, machine.memory)}, {HEADROOM:.0%} of it to stay free")
    show_buffers(plan)
    show_speed(plan, machine)


def show_buffers(plan: Plan) -> None:
    say("\nLargest buffers of the step")
    for size, shape, origin in plan.program.buffers or hlo.largest(plan.program.text):
        say(f"  {gib(size)}  {shape:<28} {hlo.words(origin)}")


def show_speed(plan: Plan, machine: Machine) -> None:
    """FLOPs, what travels, and the step's time."""
    say(f"\nFLOPs of a step: {plan.flops:.4g} ({plan.flops / max(plan.tokens, 1):.4g} a token; {flops.CONVENTION})")
    if not plan.program.fits:
        return
    total = sum(plan.received.values())
    kinds = ", ".join(f"{kind} {gib(size).strip()}" for kind, size in plan.received.items()) or "nothing"
    say(f"Received by one device in a step: {gib(total).strip()} ({kinds})")
    if plan.least:
        least = gib(plan.least).strip()
        say(f"  at least needed for weights and gradients: {least}, {total / plan.least:.3f} of it is sent")
    if (p := plan.prediction) is None:
        return
    parts = [("products", p.compute), ("memory", p.memory), ("weights and gradients on the wire", p.hidden)]
    say("\nPredicted step: " + ", ".join(f"{name} {t * 1e3:.1f} ms" for name, t in [*parts, ("activations sent", p.waited)]))
    limit = max(parts, key=lambda part: part[1])[0]
    rate = plan.tokens / p.step / len(machine.devices)
    say(f"  {p.step * 1e3:.1f} ms, limited by {limit}; {rate:,.0f} tokens/s a device; MFU at most {p.mfu:.1%}")
    say(f"  a bound, not a measurement: {cost.MODEL}")


def write(plan: Plan, machine: Machine, command: str, path: str, others: dict[str, Any]) -> None:
    """The plan as JSON."""
    chip = dataclasses.asdict(machine.chip) if machine.chip else None
    record = {
        "machine": machine.name, "devices": len(machine.devices), "chip": chip, "mesh": plan.sizes, "notes": list(plan.notes),
        "fits": plan.fits(machine), "memory": {name: round(size) for name, size in memory_rows(plan)}, "peak": plan.peak,
        "compile_seconds": plan.program.seconds, "rollout_compile_seconds": plan.rollout.seconds if plan.rollout else None,
        "largest": [list(row) for row in plan.program.buffers or hlo.largest(plan.program.text)],
        "flops": plan.flops, "flops_convention": flops.CONVENTION, "tokens": plan.tokens, "received": plan.received,
        "received_least": plan.least, "prediction": plan.prediction._asdict() if plan.prediction else None,
        "prediction_model": cost.MODEL, "command": command, **others,
    }  # fmt: skip
    Path(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    say(f"written to {path}")
