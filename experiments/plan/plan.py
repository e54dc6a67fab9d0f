"""One config on one machine: laid out, compiled, read."""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import jax

from experiments.plan import compile as compiler
from experiments.plan import cost, rl, stages, wire
from experiments.plan.machine import Machine
from experiments.plan.program import Compiled, compiled
from experiments.plan.stages import Stage
from experiments.plan.work import flops_of, tokens_of
from jaxllm.core.types import UserError

HEADROOM = 0.05  # of the memory that stays free: what the runtime and its transfers take
STAGES = {
    "pretrain": stages.pretrain, "moe": stages.mixture, "mlm": stages.masked, "t5": stages.text_to_text, "sft": stages.sft,
    "reward": stages.rewards, "dpo": stages.pairs, "kto": stages.labelled, "ppo": rl.proximal, "grpo": rl.group,
}  # fmt: skip


class Plan(NamedTuple):
    """sizes: the mesh; shares: bytes of a device by what they are for; program, rollout: compiled; peak: bytes of a device with
    all that lies beside, the larger of step and rollout; received, least: bytes a device takes in, found and by analysis."""

    config: Any
    changes: dict[str, Any]
    stage: Stage
    sizes: dict[str, int]
    notes: tuple[str, ...]
    shares: dict[str, float]
    program: Compiled
    rollout: Compiled | None
    peak: float
    prediction: cost.Prediction | None
    received: dict[str, float]
    least: float | None

    @property
    def flops(self) -> float:
        return sum(map(flops_of, self.stage.work))

    @property
    def tokens(self) -> int:
        return tokens_of(self.stage.work)

    def fits(self, machine: Machine) -> bool:
        """Whether it compiled and leaves the headroom free; on a simulated machine whatever compiles."""
        whole = self.program.fits and (self.rollout is None or self.rollout.fits)
        return whole and (not machine.memory or self.peak <= (1 - HEADROOM) * machine.memory)


def changed(config: Any, changes: dict[str, Any]) -> Any:
    """A copy of the config with other settings."""
    new = copy.deepcopy(config)
    with new.unlocked():
        new.update_from_flattened_dict(changes)
    return new


def laid_out(config: Any, experiment: str, model: str, machine: Machine) -> tuple[Any, dict, Stage, dict[str, int], tuple]:
    """(config, what was set in it, stage, mesh, notes): the mesh takes all devices, the batch divides over it."""
    if experiment not in STAGES:
        raise UserError(f"--experiment={experiment}: no plan for it, choose one of {', '.join(STAGES)}")
    stage = STAGES[experiment](config, model)
    devices = len(machine.devices)
    sizes = compiler.mesh_sizes(config, stage.specs, devices)
    changes: dict[str, Any] = {f"mesh.{axis}": n for axis, n in sizes.items() if n != config.mesh[axis]}
    notes = list(stage.notes)
    if "mesh.data" in changes and "fsdp" in sizes and config.mesh.data == 1:
        notes.append(f"no parameter tree divides over fsdp={devices}: fsdp={sizes['fsdp']}, and data={sizes['data']} copies")
    if narrow := compiler.narrow(stage.specs, sizes, machine):
        notes.append(narrow)
    shards = sizes.get("data", 1) * sizes.get("fsdp", 1) * config.accumulate
    rows = divided(config.batch_size, jax.tree.leaves(stage.batch)[0].shape[0], shards)
    if rows != config.batch_size:
        notes.append(f"batch_size {config.batch_size} does not divide over {shards}: planned with {rows}")
        changes["batch_size"] = rows
    config = changed(config, changes)
    return config, changes, STAGES[experiment](config, model) if "batch_size" in changes else stage, sizes, tuple(notes)


def divided(rows: int, trained: int, shards: int) -> int:
    """The least batch_size from `rows` on that divides over `shards`, and with it the rows of an update (trained, at `rows`)."""
    share = math.gcd(rows, trained)
    up, down = trained // share, rows // share
    start = -(-rows // shards) * shards
    tried = range(start, start + shards * down * shards + 1, shards)
    return next(n for n in tried if n % down == 0 and n // down * up % shards == 0)


def made(config: Any, experiment: str, model: str, machine: Machine, changes: dict[str, Any] | None = None) -> Plan:
    """The plan of a config with some settings changed."""
    own, set_, stage, sizes, notes = laid_out(changed(config, changes or {}), experiment, model, machine)
    with compiler.open_mesh(own, sizes, machine) as mesh:
        state, frozen = compiler.state_of(stage, mesh)
        traced = compiler.train_step(stage, own.accumulate, mesh)
        program = compiled(traced.lower())
        rollout = compiled(compiler.rollout(stage, mesh)) if stage.rollout else None
        policy = cost.local_bytes(state.params) + cost.local_bytes(frozen)
        shares = {
            "parameters": policy, "optimizer": cost.local_bytes(state.opt_state),
            "beside the step": cost.held_bytes(stage, mesh), "batch": cost.local_bytes(compiler.batch_like(stage.batch, mesh)),
        }  # fmt: skip
        peak = program.peak + shares["beside the step"]
        if rollout:  # beside it lie the state and what is frozen; adapters are merged into weights of its own
            shared = 0.0 if "lora" in stage.specs["policy"] else rollout.arguments
            peak = max(peak, rollout.peak + policy + shares["optimizer"] + shares["beside the step"] - shared)
        executed = cost.executed_flops(traced.jaxpr.jaxpr)
        prediction = cost.predict(stage, program.text, executed, mesh, machine) if program.fits else None
        found = wire.collectives(program.text) if program.fits else []
        received = {kind: sum(c.received for c in found if c.kind == kind) for kind in sorted({c.kind for c in found})}
        least = cost.minimum(stage, mesh, own.accumulate)
    return Plan(own, (changes or {}) | set_, stage, sizes, notes, shares, program, rollout, peak, prediction, received, least)
