"""Meshes and the rule table: the only place that knows how logical axes land on devices.

Mesh axes: `data` holds copies of the weights, `fsdp` splits weights and batch alike (ZeRO-3, arXiv 1910.02054), `tensor` splits
heads and feed-forward widths (arXiv 1909.08053), `expert` the experts, `context` the length of sequences (ring attention,
arXiv 2310.01889). With residual=context+tensor the activations between layers are split over `tensor` too (sequence
parallelism, arXiv 2205.05198).
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxllm.core.spec import Rules, mesh_axes
from jaxllm.core.types import UserError

AXES = ("data", "fsdp", "tensor", "expert", "context")

# Parameters: embed, heads, kv_heads, mlp, vocab, layers, experts. Activations: batch, length (residual: the length of what
# goes from layer to layer) and the same heads, mlp, vocab.
RULES: Rules = {
    "batch": ("data", "fsdp"),
    "length": "context",
    "residual": "context",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "experts": "expert",
    "layers": None,
}

_rules: contextvars.ContextVar[Rules] = contextvars.ContextVar("rules", default=RULES)


def make_rules(text: str = "") -> Rules:
    """RULES with the changes of a text: "residual=context+tensor, vocab=none". Raises UserError on unknown names."""
    rules = dict(RULES)
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, value = (x.strip() for x in part.partition("="))
        names = tuple(x.strip() for x in value.split("+")) if value not in ("", "none") else ()
        if name not in RULES:
            raise UserError(f"config.rules: unknown logical axis {name!r} in {part!r}; there are {', '.join(RULES)}")
        if wrong := [n for n in names if n not in AXES]:
            raise UserError(f"config.rules: unknown mesh axis {wrong[0]!r} in {part!r}; there are {', '.join(AXES)}, none")
        if not value or len(set(names)) < len(names):
            raise UserError(f"config.rules: {part!r}: give each mesh axis once, as in {name}=context+tensor, or {name}=none")
        rules[name] = names or None
    return rules


def make_mesh(sizes: Mapping[str, int] | None = None, devices: Any = None) -> Mesh:
    """A mesh over all of AXES (missing ones 1; one may be -1: the devices that are left) on the first devices.

    Axes are Auto: embedding gathers and sharding constraints fail on Explicit ones. Where the devices are of several slices,
    whose links are slower, `data` goes over the slices, or `fsdp` where data is 1.
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
        named = {axis: size for axis, size in zip(AXES, shape, strict=True) if size > 1}
        raise UserError(f"mesh {named} needs {need} devices, here are {len(devices)}: {_nearest(shape, len(devices))}")
    return Mesh(_grid(shape, devices[:need]), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _nearest(shape: list[int], have: int) -> str:
    """The mesh nearest to an impossible one: its largest axis cut to what is there."""
    largest = shape.index(max(shape))
    rest = math.prod(shape) // shape[largest]
    return f"use {AXES[largest]}={have // rest}" if rest <= have else f"use mesh sizes whose product is at most {have}"


def _grid(shape: list[int], devices: list[Any]) -> np.ndarray:
    """The devices in the mesh's shape, neighbours on the wire beside each other."""
    from jax.experimental import mesh_utils

    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if slices > 1:
        across = next((i for i in (0, 1) if shape[i] % slices == 0), None)
        if across is None:
            raise UserError(f"mesh.data={shape[0]} and mesh.fsdp={shape[1]}: one must be a multiple of the {slices} slices")
        outer = [slices if i == across else 1 for i in range(len(shape))]
        inner = [size // o for size, o in zip(shape, outer, strict=True)]
        return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    if devices[0].platform == "tpu" and len(devices) > 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return np.asarray(devices).reshape(shape)


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

    A dimension that its mesh axes do not divide (the one token of a decoding step over `context`) is left whole. Inside
    `jax.shard_map` the mesh axes that it maps over are left out: there the array is already one device's part. Raises
    UserError when two of the names land on one mesh axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*activation_axes(axes, x.shape, mesh)))


def activation_axes(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Any) -> list[tuple[str, ...] | None]:
    """For each dimension of an activation the mesh axes (above 1, not manual) that it is split over under the current rules."""
    out: list[tuple[str, ...] | None] = []
    used: dict[str, str] = {}
    for logical, size in zip(axes, shape, strict=True):
        names = mesh_axes(logical, _rules.get())
        names = tuple(n for n in names if mesh.shape[n] > 1 and n not in mesh.manual_axes)
        for name in names:
            if name in used:
                raise UserError(
                    f"activation axes {used[name]!r} and {logical!r} both map to mesh axis {name!r}: change config.rules"
                )
            used[name] = str(logical)
        out.append(names if names and size % math.prod(mesh.shape[n] for n in names) == 0 else None)
    return out


def axis_size(logical: str) -> int:
    """Over how many devices a logical axis is split under the current mesh (1 without one)."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[n] for n in mesh_axes(logical, _rules.get()))


def current_rules() -> Rules:
    """The rule table of the enclosing `use`."""
    return _rules.get()


def process_rows(mesh: Mesh) -> tuple[int, int]:
    """(index, count): this process reads part `index` of `count` equal parts of every batch.

    Processes whose devices lie on the same rows (a `tensor` axis over processes) read the same part.
    """
    order = [AXES.index(n) for n in mesh_axes("batch", _rules.get())]
    shards: dict[int, set[int]] = {}
    for place in np.ndindex(mesh.devices.shape):
        row = 0
        for axis in order:
            row = row * mesh.devices.shape[axis] + place[axis]
        shards.setdefault(mesh.devices.item(*place).process_index, set()).add(row)
    parts = sorted({tuple(sorted(rows)) for rows in shards.values()})
    mine = tuple(sorted(shards[jax.process_index()]))
    total = math.prod(mesh.devices.shape[axis] for axis in order)
    if any(part != tuple(range(i * len(mine), (i + 1) * len(mine))) for i, part in enumerate(parts)) or (
        len(parts) * len(mine) != total
    ):
        raise UserError(
            f"mesh {dict(mesh.shape)} does not give each of the {len(shards)} processes a run of rows: "
            "put `data` or `fsdp` over the processes"
        )
    return parts.index(mine), len(parts)


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Host arrays [b, ...] of this process (its part by `process_rows`) to global arrays split over the axes of `batch`.

    The second dimension of what is [b, l, ...] is split over the axes of `length` where they divide it.
    """
    rows_over, length_over = mesh_axes("batch", _rules.get()), mesh_axes("length", _rules.get())
    shards, pieces = (math.prod(mesh.shape[n] for n in names) for names in (rows_over, length_over))
    index, count = process_rows(mesh) if jax.process_count() > 1 else (0, 1)

    def one(x: np.ndarray) -> jax.Array:
        rows = x.shape[0] * count
        if rows % shards:
            raise UserError(
                f"batch_size {rows} does not divide over the {shards} devices of mesh axes {rows_over}: "
                f"use a multiple of {shards}"
            )
        split = pieces > 1 and x.ndim > 1 and x.shape[1] % pieces == 0
        where = NamedSharding(mesh, PartitionSpec(rows_over or None, length_over) if split else PartitionSpec(rows_over or None))
        if count == jax.process_count() and not split:
            return jax.make_array_from_process_local_data(where, x)
        first = index * x.shape[0]

        def part(place: Any) -> np.ndarray:
            start, stop, _ = place[0].indices(rows)
            return x[(slice(start - first, stop - first), *place[1:])]

        return jax.make_array_from_callback((rows, *x.shape[1:]), where, part)

    return jax.tree.map(one, batch)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Every leaf on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
