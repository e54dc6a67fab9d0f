"""Not enough memory, said before anything is allocated or compiled: what a train step must hold at least, and what would fit.

The count is of the real step, traced and not compiled: parameters, optimizer, gradients, and what the backward pass keeps. XLA
needs more than that (a layer that is computed again, the vocabulary's chunk), so a config that is refused does not fit.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from experiments import common
from jaxllm.core import sharding, spec, tree
from jaxllm.core.types import Model, UserError
from jaxllm.losses import lm
from jaxllm.models import families
from jaxllm.train import fit_memory, moments
from jaxllm.train.step import split_trainable

SPARE = 1.1  # what is offered as a fix must fit with this much room
OFFERED = 3


class Need(NamedTuple):
    """Bytes that each device of a mesh holds at least during a train step."""

    parameters: float
    optimizer: float
    gradients: float
    activations: float

    def text(self) -> str:
        return ", ".join(f"{name} {gib(size)}" for name, size in self._asdict().items())


class Step(NamedTuple):
    """What is trained: a model under a root, which of its leaves, by a loss (None: next tokens), on rows of these columns."""

    model: Model
    root: str = "policy"
    trainable: str = ".*"
    loss_fn: Any = None
    columns: Any = None
    tx: Any = None


def gib(size: float) -> str:
    return f"{size / fit_memory.GIB:.3g}"


def check(config: Any, step: Step, held: float = 0.0) -> None:
    """UserError with the sizes and with settings that fit, when the step cannot. held: bytes of parameters that are there."""
    if not config.gates:
        return
    mesh = sharding.make_mesh(dict(config.mesh))
    room = room_of(mesh, held)
    if room is None or sum(need := needed(config, step)) <= room:
        return
    where = f"each of {mesh.size} x {mesh.devices.flat[0].device_kind}" if mesh.size > 1 else mesh.devices.flat[0].device_kind
    found = [f"{text} ({gib(size)})" for text, size in fixes(config, step, room)]
    none = "use a smaller model or more devices; python -m experiments.plan shows what takes it"
    fix = f"Any one of these fits: {' · '.join(found)}" if len(found) > 1 else f"This fits: {found[0]}" if found else none
    raise UserError(
        f"Not enough memory: this config needs about {gib(sum(need))} GiB on {where} ({gib(room)} GiB): {need.text()}. {fix}"
    )


def room_of(mesh: Any, held: float = 0.0) -> float | None:
    """Bytes that each device of a mesh may hold; devices that are CPUs share what the host has left."""
    own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    if not own or (limit := fit_memory.limit_of(own[0])) is not None:
        return limit if own else None
    left = fit_memory.host_room()
    return None if left is None else (left + held) / len(own)


def needed(config: Any, step: Step) -> Need:
    """The bytes a device of a step of the config, from a trace of it."""
    with common.open_mesh(config) as mesh:
        everywhere = NamedSharding(mesh, PartitionSpec())
        params = {step.root: spec.abstract(step.model.specs, spec.shardings(step.model.specs, mesh, sharding.current_rules()))}
        chosen, frozen = split_trainable(params, step.trainable)
        tx = step.tx or common.optimizer(config)[0]
        state = moments.abstract(tx, chosen, everywhere)
        kept = _kept(step.loss_fn or lm.loss(step.model), chosen, frozen, _batch(config, step))
    whole = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(params))
    activations = max(0.0, kept - whole) / mesh.size
    return Need(_on_device(params), _on_device(state), _on_device(chosen), activations)


def _kept(loss_fn: Callable, chosen: Any, frozen: Any, batch: Any) -> float:
    """Bytes of what the forward pass leaves for the backward pass, parameters included."""

    def backward(chosen: Any, frozen: Any, batch: Any, key: Any) -> Any:
        return jax.vjp(lambda p: loss_fn(tree.merge(p, frozen), batch, key)[0].total, chosen)[1]

    shapes = jax.eval_shape(backward, chosen, frozen, batch, jax.eval_shape(lambda: jax.random.key(0)))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def _batch(config: Any, step: Step) -> Any:
    """The shapes of one micro-batch."""
    rows = config.batch_size // config.accumulate
    if step.columns is not None:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), step.columns)
    shape = (rows, config.data.length)
    ids = {name: jax.ShapeDtypeStruct(shape, "int32") for name in ("tokens", "targets", "segments")}
    return ids | {"mask": jax.ShapeDtypeStruct(shape, bool)}


def _on_device(tree_: Any) -> float:
    leaves = [x for x in jax.tree.leaves(tree_) if x.sharding.memory_kind != moments.HOST]
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves))


# ---- what to change


def fixes(config: Any, step: Step, room: float) -> list[tuple[str, float]]:
    """(a setting, the bytes with it) of those that fit alone, at most OFFERED."""
    found: list[tuple[str, float]] = []
    for name, values in changes(config, step):
        for value in values:
            size = _with(config, step, name, value)
            if size * SPARE <= room:
                found.append((f"--config.{name}={value}", size))
                break
        if len(found) == OFFERED:
            break
    return found


def changes(config: Any, step: Step) -> Iterator[tuple[str, list[Any]]]:
    """(setting, values to try, the mildest first)."""
    shards = config.mesh.data * config.mesh.fsdp
    rows = config.batch_size // shards
    yield "accumulate", [a for a in range(config.accumulate + 1, rows + 1) if rows % a == 0]
    if "model" in config and "remat" in config.model and step.loss_fn is None and step.model.config.remat != "full":
        yield "model.remat", ["full"]
    if step.tx is None:
        yield "optim.name", ["adafactor"] if config.optim.name == "adamw" else []
        yield "optim.moments", ["bfloat16"] if config.optim.moments == "float32" else []
    unit = shards * config.accumulate
    yield "batch_size", [n for n in (config.batch_size >> k for k in range(1, 20)) if n and n % unit == 0]


def _with(config: Any, step: Step, name: str, value: Any) -> float:
    """The bytes a device with one setting changed; infinite where it cannot be."""
    other = copy.deepcopy(config)
    with other.unlocked():
        other.update_from_flattened_dict({name: value})
    if name == "model.remat":
        step = step._replace(model=families.make(dataclasses.replace(step.model.config, remat=value)))
    try:
        return sum(needed(other, step))
    except UserError:
        return math.inf
