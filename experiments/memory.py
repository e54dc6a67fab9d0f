"""Not enough memory, said before an optimizer is allocated or a step compiled: what it must hold at least, and what would fit.

Every stage asks through `begin`, which makes its state and its step; pretraining asks before it reads any text too.

The count is of the real step, traced and not compiled: parameters, optimizer, gradients, and what the backward pass keeps. XLA
needs more than that (a layer that is computed again, the vocabulary's chunk), so a config that is refused does not fit.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from experiments import common
from jaxllm.core import sharding, spec, tree
from jaxllm.core.types import Model, UserError
from jaxllm.losses import lm
from jaxllm.models import families
from jaxllm.train import fit_memory, moments, processes
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
    """What is trained: a model under a root, which of its leaves, by a loss (None: next tokens), on rows of these columns.

    tx: the optimizer, where it is none of config.optim; params: all roots as arrays, where they are there; beside: what else lies
    on the devices (a reference, a judge); rows: how many of the columns' rows an update reads (None: config.batch_size).
    """

    model: Model
    root: str = "policy"
    trainable: str = ".*"
    loss_fn: Any = None
    columns: Any = None
    tx: Any = None
    params: Any = None
    beside: Any = ()
    rows: Callable[[Any], int] | None = None


def gib(size: float) -> str:
    return f"{size / fit_memory.GIB:.3g}"


def begin(config: Any, step: Step, loss_fn: Any, tx: Any, mesh: Any) -> tuple[Any, Any, Callable]:
    """(state, frozen, the compiled step of loss_fn) of a stage whose step.params are there. What takes the room comes behind
    the check: the optimizer's state, and what the step itself holds."""
    trained = {id(x) for x in jax.tree.leaves(step.params)}  # adapters' reference is their own base
    check(config, step._replace(beside=[x for x in jax.tree.leaves(step.beside) if id(x) not in trained]))
    state, frozen = common.new_state(step.params, tx, mesh, step.trainable)
    return state, frozen, common.jit_step(loss_fn, tx, state, config.accumulate)


def check(config: Any, step: Step) -> None:
    """UserError with the sizes and with settings that fit, when the step cannot."""
    if not config.gates:
        return
    mesh = sharding.make_mesh(dict(config.mesh))
    held = sum(x.nbytes for x in jax.tree.leaves((step.params, step.beside)))
    room = processes.from_first(lambda: room_of(mesh, held))  # hosts differ by a little, and all must answer alike
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
        place = partial(_place, everywhere)
        params, beside = jax.tree.map(place, step.params), jax.tree.map(place, step.beside)
        if params is None:
            where = spec.shardings(step.model.specs, mesh, sharding.current_rules())
            params = {step.root: spec.abstract(step.model.specs, where)}
        chosen, frozen = split_trainable(params, step.trainable)
        tx = step.tx or common.optimizer(config)[0]
        state = moments.abstract(tx, chosen, everywhere)
        kept = _kept(step.loss_fn or lm.loss(step.model), chosen, frozen, _batch(config, step))
    whole = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(params))
    activations = max(0.0, kept - whole) / mesh.size
    return Need(_on_device((params, beside)), _on_device(state), _on_device(chosen), activations)


def _place(everywhere: NamedSharding, x: Any) -> jax.ShapeDtypeStruct:
    """An array as its shape, where `common.new_state` leaves it."""
    where = x.sharding if isinstance(x.sharding, NamedSharding) else everywhere
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def _kept(loss_fn: Callable, chosen: Any, frozen: Any, batch: Any) -> float:
    """Bytes of what the forward pass leaves for the backward pass, parameters included."""

    def backward(chosen: Any, frozen: Any, batch: Any, key: Any) -> Any:
        return jax.vjp(lambda p: loss_fn(tree.merge(p, frozen), batch, key)[0].total, chosen)[1]

    shapes = jax.eval_shape(backward, chosen, frozen, batch, jax.eval_shape(lambda: jax.random.key(0)))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def _batch(config: Any, step: Step) -> Any:
    """The shapes of one micro-batch."""
    rows = rows_of(config, step) // config.accumulate
    if step.columns is not None:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), step.columns)
    shape = (rows, config.data.length)
    ids = {name: jax.ShapeDtypeStruct(shape, "int32") for name in ("tokens", "targets", "segments")}
    return ids | {"mask": jax.ShapeDtypeStruct(shape, bool)}


def rows_of(config: Any, step: Step) -> int:
    """Rows of an update."""
    return config.batch_size if step.rows is None else step.rows(config)


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
    rows = rows_of(config, step) // shards
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
