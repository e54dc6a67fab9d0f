"""What to change when a plan does not fit, each answer compiled."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from experiments.plan import machine as machines
from experiments.plan.machine import Machine
from experiments.plan.plan import HEADROOM, Plan, made
from jaxllm.models import stack

REMAT = [name for name in stack.POLICIES if name != "offload"]  # from the least recomputation to the most


def steps(plan: Plan) -> Iterator[dict[str, Any]]:
    """Changes, each on top of those before: recompute more, smaller micro-batches, smaller moments, more fsdp, fewer rows."""
    config, sizes, given = plan.config, plan.sizes, {}
    if "model" in config and "remat" in config.model:
        for policy in REMAT[REMAT.index(config.model.remat) + 1 :] if config.model.remat in REMAT else []:
            given = {"model.remat": policy}
            yield given
    shards = sizes.get("data", 1) * sizes.get("fsdp", 1)
    rows = rows_of(plan) // shards // config.accumulate
    parts = [n for n in range(2, rows + 1) if rows % n == 0]
    for part in dict.fromkeys(parts[:1] + parts[-1:]):
        given = {**given, "accumulate": config.accumulate * part}
        yield given
    if "moments" in config.optim and config.optim.moments != "bfloat16":
        given = {**given, "optim.moments": "bfloat16"}
        yield given
    if sizes.get("data", 1) > 1:
        given = {**given, "mesh.data": 1, "mesh.fsdp": shards}
        yield given
    fewer = shards * given.get("accumulate", config.accumulate)
    if config.batch_size > shards:
        given = {**given, "accumulate": 1, "batch_size": shards} if fewer > shards else {**given, "batch_size": shards}
        yield given


def rows_of(plan: Plan) -> int:
    """Rows that one update trains on."""
    import jax

    return jax.tree.leaves(plan.stage.batch)[0].shape[0]


def hopeless(plan: Plan, machine: Machine) -> bool:
    """Whether weights and moments alone, the moments in half their bytes, are more than there is: then only devices help."""
    state = plan.shares["parameters"] + plan.shares["optimizer"] / 2 + plan.shares["beside the step"]
    return state > (1 - HEADROOM) * machine.memory


def first_that_fits(plan: Plan, config: Any, experiment: str, model: str, machine: Machine, say: Any) -> Plan | None:
    """The first change after which the plan fits, compiled; None when none does."""
    if hopeless(plan, machine):
        return None
    for changes in steps(plan):
        tried = made(config, experiment, model, machine, changes)
        say(f"tried {flags(changes)}: {tried.peak / 2**30:.2f} GiB, {'fits' if tried.fits(machine) else 'does not fit'}")
        if tried.fits(machine):
            return tried
    return None


def larger(plan: Plan, config: Any, experiment: str, model: str, machine: Machine, say: Any) -> tuple[Machine, Plan] | None:
    """The smallest slice of the same chip on which it fits, compiled; None when there is none."""
    kind = machine.name.partition(":")[0]
    size = lambda shape: math.prod(int(x) for x in shape.split("x"))  # noqa: E731
    have = len(machine.devices)
    state = (plan.shares["parameters"] + plan.shares["optimizer"] + plan.shares["beside the step"]) * have
    room = (1 - HEADROOM) * machine.memory
    for shape in machines.SHAPES.get(kind, ()):
        devices = size(shape) * round(1 / machine.part)
        if devices > have and state / devices < 0.9 * room:
            other = machines.find(f"{kind}:{shape}", 0)
            tried = made(config, experiment, model, other)
            say(f"tried {other.name}: {tried.peak / 2**30:.2f} GiB, {'fits' if tried.fits(other) else 'does not fit'}")
            if tried.fits(other):
                return other, tried
    return None


def flags(changes: dict[str, Any]) -> str:
    """Settings as one writes them."""
    return " ".join(f"--config.{name}={value}" for name, value in changes.items())
