"""One tree of `Spec`s describes a model's parameters; initial values, shapes, counts and shardings derive from it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.core.tree import map_paths
from jaxllm.core.types import Key, UserError

Initializer = Callable[..., jax.Array]  # (key, shape, dtype) -> array, as in jax.nn.initializers
SpecTree = Any
Rules = Mapping[str, str | tuple[str, ...] | None]


@dataclass(frozen=True)
class Spec:
    """One parameter: its shape, a logical axis name (or None) for each dimension, and its initializer."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")


def stack(specs: SpecTree, n: int) -> SpecTree:
    """The specs of n equal layers held in one array each, with a leading axis `layers`; each layer draws its own values."""

    def one(spec: Spec) -> Spec:
        def init(key: Key, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            return jax.vmap(lambda k: spec.init(k, shape[1:], dtype))(jax.random.split(key, shape[0]))

        return Spec((n, *spec.shape), ("layers", *spec.axes), init, spec.dtype)

    return jax.tree.map(one, specs)


def unstack(params: Any) -> Any:
    """The parameters with every stack (under a name that ends in `layers`) as a tuple of one tree a layer.

    That is what a decoding loop reads fastest.
    """
    if not isinstance(params, dict):
        return params

    def one(stacked: Any) -> tuple[Any, ...]:
        n = jax.tree.leaves(stacked)[0].shape[0]
        return tuple(jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(n))

    return {name: one(x) if name.endswith("layers") and isinstance(x, dict) else x for name, x in params.items()}


def init(specs: SpecTree, key: Key) -> Any:
    """Arrays for every spec. The path is folded into the key, so adding a leaf moves no other leaf's values."""

    def one(path: str, spec: Spec) -> jax.Array:
        return spec.init(jax.random.fold_in(key, zlib.crc32(path.encode())), spec.shape, spec.dtype)

    return map_paths(one, specs)


def abstract(specs: SpecTree, shardings: Any = None) -> Any:
    """The same tree as jax.ShapeDtypeStructs, with shardings when given: what compilation and restore need."""
    if shardings is None:
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), specs)
    return jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), specs, shardings)


def count(specs: SpecTree) -> int:
    """The number of parameters, the rows that pad the vocabulary included."""
    return sum(math.prod(s.shape) for s in jax.tree.leaves(specs))


def shardings(specs: SpecTree, mesh: Mesh, rules: Rules) -> Any:
    """A NamedSharding per spec.

    Raises UserError when two logical axes of one parameter land on the same mesh axis of size above 1, or when a
    dimension does not divide.
    """

    def one(path: str, spec: Spec) -> NamedSharding:
        used: dict[str, str] = {}
        dims: list[tuple[str, ...] | None] = []
        for size, logical in zip(spec.shape, spec.axes, strict=True):
            names = mesh_axes(logical, rules)
            shards = math.prod(mesh.shape[n] for n in names)
            if size % shards:
                raise UserError(
                    f"{path}: axis {logical!r} of size {size} does not divide over mesh axes {names} "
                    f"({shards} devices): {_largest(size, shards)} would, or map {logical!r} elsewhere with config.rules"
                )
            # mesh axes of size 1 are left out: JAX refuses one that is named twice, whatever its size
            names = tuple(n for n in names if mesh.shape[n] > 1)
            dims.append(names or None)
            for name in names:
                if name in used:
                    raise UserError(
                        f"{path}: logical axes {used[name]!r} and {logical!r} both map to mesh axis {name!r}: change the rules"
                    )
                used[name] = str(logical)
        return NamedSharding(mesh, PartitionSpec(*dims))

    return map_paths(one, specs)


def _largest(size: int, shards: int) -> int:
    """The most devices, at most `shards`, that a dimension divides over."""
    return max(n for n in range(1, shards + 1) if size % n == 0)


def mesh_axes(logical: str | None, rules: Rules) -> tuple[str, ...]:
    """The mesh axes of a logical axis; () where there is no rule: it is replicated."""
    target = rules.get(logical) if logical is not None else None
    if target is None:
        return ()
    return (target,) if isinstance(target, str) else tuple(target)
