"""Meshes and the rule table: the only place that knows how logical axes land on devices."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxllm.core.spec import Rules, partition_spec
from jaxllm.core.types import UserError

AXES = ("data", "fsdp", "tensor", "expert", "context")

# Parameters: embed, heads, kv_heads, mlp, vocab, layers, experts. Activations: batch, length and the same heads, mlp, vocab.
RULES: Rules = {
    "batch": ("data", "fsdp"),
    "length": "context",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "experts": "expert",
    "layers": None,
}

_rules: contextvars.ContextVar[Rules] = contextvars.ContextVar("rules", default=RULES)


def make_mesh(sizes: Mapping[str, int] | None = None, devices: Any = None) -> Mesh:
    """A mesh over all of AXES (missing ones 1; one may be -1: the devices that are left) on the first devices.

    Axes are Auto: embedding gathers and sharding constraints fail on Explicit ones.
    """
    sizes = dict(sizes or {})
    devices = list(jax.devices() if devices is None else devices)
    if unknown := sorted(set(sizes) - set(AXES)):
        raise UserError(f"unknown mesh axis {unknown[0]!r}; the axes are {', '.join(AXES)}")
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    if shape.count(-1) > 1 or any(s == 0 or s < -1 for s in shape):
        raise UserError(f"mesh sizes {dict(sizes)}: each is at least 1, and one may be -1")
    if -1 in shape:
        shape[shape.index(-1)] = max(1, len(devices) // -math.prod(shape))
    if (need := math.prod(shape)) > len(devices):
        raise UserError(f"mesh {dict(zip(AXES, shape, strict=True))} needs {need} devices, here are {len(devices)}")
    grid = np.asarray(devices[:need]).reshape(shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules = RULES) -> Iterator[Mesh]:
    """Run a block under a mesh and a rule table."""
    token = _rules.set(rules)
    try:
        with jax.set_mesh(mesh):
            yield mesh
    finally:
        _rules.reset(token)


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrain an activation, one logical name (or None) per dimension. Without a mesh this is the identity.

    Inside `jax.shard_map` the mesh axes that it maps over are left out: there the array is already one device's part.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    spec = (_without(part, mesh.manual_axes) for part in partition_spec(axes, _rules.get()))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def _without(part: Any, manual: tuple[str, ...]) -> Any:
    names = (part,) if isinstance(part, str) else tuple(part or ())
    return tuple(name for name in names if name not in manual) or None


def axis_size(logical: str) -> int:
    """Over how many devices a logical axis is split under the current mesh (1 without one)."""
    mesh = jax.sharding.get_abstract_mesh()
    target = _rules.get().get(logical)
    if mesh.empty or target is None:
        return 1
    return math.prod(mesh.shape[n] for n in ((target,) if isinstance(target, str) else target))


def put_batch(batch: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Host arrays [b, ...] of this process to global arrays split over the axes of `batch`."""
    shards = math.prod(mesh.shape[n] for n in rules["batch"] or ())
    sharding = NamedSharding(mesh, PartitionSpec(rules["batch"]))

    def one(x: np.ndarray) -> jax.Array:
        rows = x.shape[0] * jax.process_count()
        if rows % shards:
            raise UserError(
                f"batch_size {rows} does not divide over the {shards} devices of mesh axes {rules['batch']}: "
                f"use a multiple of {shards}"
            )
        return jax.make_array_from_process_local_data(sharding, x)

    return jax.tree.map(one, batch)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Every leaf on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
