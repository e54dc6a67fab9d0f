"""Lowering and compiling a stage for a machine that may not be there."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from experiments import common
from experiments.plan.machine import Machine
from experiments.plan.stage import Stage
from jaxllm.core import sharding, spec
from jaxllm.core.types import TrainState, UserError
from jaxllm.train import moments
from jaxllm.train.step import split_trainable

LANES = 128  # of a TPU's registers


def mesh_sizes(config: Any, specs: Any, devices: int) -> dict[str, int]:
    """The mesh of the config; axes left at their default of 1 give fsdp what is left, or data what fsdp cannot divide.

    UserError for an explicit mesh that does not use all devices.
    """
    given = {axis: size for axis, size in config.mesh.to_dict().items() if size != 1}
    used = math.prod(given.values())
    if devices % used or ("fsdp" in given and "data" in given and used != devices) or used > devices:
        largest = max(given, key=lambda axis: given[axis])
        rest = used // given[largest]
        near = f"{largest}={devices // rest}" if devices % rest == 0 else "sizes whose product divides it"
        raise UserError(f"config.mesh {given} has a product of {used}, the machine has {devices} devices: use {near}")
    left = devices // used
    if "fsdp" in given:
        return {**given, "data": left * given.get("data", 1)}
    rules = sharding.make_rules(config.rules)
    for split in (n for n in range(left, 0, -1) if left % n == 0):
        sizes = {**given, "fsdp": split, "data": given.get("data", 1) * (left // split)}
        if split == 1 or ("data" not in given or left == split) and divides(specs, sizes, rules):
            return sizes
    raise AssertionError("fsdp=1 divides everything")


def narrow(specs: Any, sizes: dict[str, int], machine: Machine) -> str:
    """What to know where fsdp cuts the model's width into parts of less than a TPU's 128 lanes; "" elsewhere.

    XLA then sends each gather and each scatter as an all-reduce: twice the bytes (seen on v5p, width 4096 over 64).
    """
    dims = [dim for leaf in jax.tree.leaves(specs) for dim in zip(leaf.axes, leaf.shape, strict=True)]
    widths = [size for axis, size in dims if axis == "embed"]
    fsdp, least = sizes.get("fsdp", 1), min(widths, default=0)
    if machine.devices[0].platform != "tpu" or not widths or least // fsdp >= LANES or least < LANES:
        return ""
    better = max(n for n in range(1, fsdp + 1) if fsdp % n == 0 and least // n >= LANES)
    return (
        f"fsdp={fsdp} cuts the width {least} into parts below {LANES}, a TPU's lanes, and weights travel as all-reduces: "
        f"compare --config.mesh.fsdp={better} --config.mesh.data={sizes.get('data', 1) * fsdp // better}"
    )


def divides(specs: Any, sizes: dict[str, int], rules: Any) -> bool:
    """Whether every parameter can be laid out on such a mesh."""
    abstract = jax.sharding.AbstractMesh(tuple(sizes.get(a, 1) for a in sharding.AXES), sharding.AXES)
    try:
        spec.shardings(specs, abstract, rules)
        return True
    except UserError:
        return False


def open_mesh(config: Any, sizes: dict[str, int], machine: Machine) -> Any:
    """`common.open_mesh` on other devices."""
    return sharding.use(sharding.make_mesh(sizes, machine.devices), sharding.make_rules(config.rules))


def batch_like(batch: Any, mesh: Any) -> Any:
    """Shapes of a batch as `sharding.put_batch` lays it out."""
    rules = sharding.current_rules()
    rows, length = (spec.mesh_axes(name, rules) for name in ("batch", "length"))
    size = lambda names: math.prod(mesh.shape[n] for n in names)  # noqa: E731

    def one(x: Any) -> Any:
        split = x.ndim > 1 and size(length) > 1 and x.shape[1] % size(length) == 0
        where = NamedSharding(mesh, PartitionSpec(rows, length) if split else PartitionSpec(rows))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree.map(one, batch)


def state_of(stage: Stage, mesh: Any) -> tuple[Any, Any]:
    """(state, frozen) as shapes with the layout that `common.new_state` gives them."""
    params = spec.abstract(stage.specs, spec.shardings(stage.specs, mesh, sharding.current_rules()))
    chosen, frozen = split_trainable(params, stage.trainable)
    everywhere = NamedSharding(mesh, PartitionSpec())
    step = jax.ShapeDtypeStruct((), "int32", sharding=everywhere)
    return TrainState(step, chosen, moments.abstract(stage.tx, chosen, everywhere)), frozen


def train_step(stage: Stage, accumulate: int, mesh: Any) -> Any:
    """The traced train step, as `common.jit_step` makes it."""
    state, frozen = state_of(stage, mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    step = common.jit_step(stage.loss, stage.tx, state, accumulate)
    return step.trace(state, frozen, batch_like(stage.batch, mesh), key)


def rollout(stage: Stage, mesh: Any) -> Any:
    """The lowered rollout: sampling with plain weights."""
    sample, prompts = stage.rollout
    root = {name: specs for name, specs in stage.specs["policy"].items() if name != "lora"}
    params = spec.abstract(root, spec.shardings(root, mesh, sharding.current_rules()))
    key = jax.eval_shape(lambda: jax.random.key(0))
    return sample.lower(params, batch_like(prompts, mesh), key, jax.ShapeDtypeStruct((), "int32"))
