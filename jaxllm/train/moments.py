"""Where an optimizer's state lies and in which precision: moments follow their parameters, whatever the optimizer.

A leaf of the state belongs to the parameter whose path its own path ends with (optax's states are records of trees like the
parameters'), so this needs to know no optimizer, nor what wraps it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.core.tree import flatten
from jaxllm.core.types import Params, UserError

DTYPES = ("float32", "bfloat16")
HOST = "pinned_host"
FACTORED = {"v_row": -1, "v_col": -2}  # what they are a mean over: the largest dimension, and the second largest


def map_moments(fn: Callable[[str, Any, Any], Any], state: Any, params: Params) -> Any:
    """fn(field, leaf, parameter) over the leaves that belong to a parameter; field: the record's (`mu`, `v_row`)."""
    known = flatten(params)

    def one(path: tuple, leaf: Any) -> Any:
        cut = len(path)
        while cut and isinstance(path[cut - 1], jax.tree_util.DictKey):
            cut -= 1
        owner = known.get("/".join(str(k.key) for k in path[cut:]))
        return leaf if owner is None else fn(str(getattr(path[cut - 1], "name", "")) if cut else "", leaf, owner)

    return jax.tree_util.tree_map_with_path(one, state)


def shardings(tx: optax.GradientTransformation, params: Params, everywhere: NamedSharding) -> Any:
    """Where each leaf of tx's state belongs: moments like their parameter, factored ones like its dimensions that they keep.

    The rest (counters, placeholders) is replicated. What tx keeps in the host's memory (`offloaded`) stays there.
    """

    def place(field: str, leaf: Any, parameter: Any) -> NamedSharding:
        kind = HOST if leaf.memory_space == jax.memory.Space.Host else None
        return NamedSharding(everywhere.mesh, _kept(field, leaf.shape, parameter), memory_kind=kind)

    program, shapes = jax.make_jaxpr(tx.init, return_shape=True)(params)
    placed = map_moments(place, jax.tree.unflatten(jax.tree.structure(shapes), program.out_avals), params)
    return jax.tree.map(lambda x: x if isinstance(x, NamedSharding) else everywhere, placed)


def abstract(tx: optax.GradientTransformation, params: Params, everywhere: NamedSharding) -> Any:
    """The shapes and places of tx's state for parameters that are shapes with shardings: what compiling ahead of time needs."""
    one = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)  # noqa: E731
    return jax.tree.map(one, jax.eval_shape(tx.init, params), shardings(tx, params, everywhere))


def _kept(field: str, shape: tuple[int, ...], parameter: Any) -> PartitionSpec:
    """The parameter's spec, cut to what a moment of `shape` keeps of its dimensions."""
    spec = (*parameter.sharding.spec, *(None,) * (parameter.ndim - len(parameter.sharding.spec)))
    if shape == parameter.shape:
        return PartitionSpec(*spec)
    if field in FACTORED and len(shape) == parameter.ndim - 1:
        dropped = int(np.argsort(parameter.shape)[FACTORED[field]])  # as optax chooses
        if shape == parameter.shape[:dropped] + parameter.shape[dropped + 1 :]:
            return PartitionSpec(*spec[:dropped], *spec[dropped + 1 :])
    return PartitionSpec()


def init(tx: optax.GradientTransformation, params: Params, everywhere: NamedSharding) -> Any:
    """tx's state for parameters that lie where they stay, made where `shardings` says: never on one device first."""
    return jax.jit(tx.init, out_shardings=shardings(tx, params, everywhere))(params)


def stored(tx: optax.GradientTransformation, dtype: Any) -> optax.GradientTransformation:
    """tx with moments kept in `dtype` between steps and float32 within a step; parameters and counters are not touched.

    bfloat16 rounds to 8 bits: a moment that should change by less than 1/512 of itself in a step does not change at all. A
    second moment falls by 1 - b2 of itself at most, so it needs b2 below 0.99 (AdamW's 0.999 would keep the largest gradient
    for ever); rounding is to nearest.
    """

    tx = optax.with_extra_args_support(tx)

    def cast(to: Any, state: Any, params: Params) -> Any:
        return map_moments(lambda _, m, p: m.astype(to) if jnp.issubdtype(m.dtype, jnp.floating) else m, state, params)

    def start(params: Params) -> Any:
        return cast(dtype, tx.init(params), params)

    def update(grads: Any, state: Any, params: Params | None = None, **extra: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, cast(jnp.float32, state, grads), params, **extra)
        return updates, cast(dtype, state, grads)

    return optax.GradientTransformationExtraArgs(start, update)


def check_b2(dtype: str, b2: float) -> None:
    """UserError when second moments could never fall again in this precision."""
    if dtype == "bfloat16" and b2 > 0.99:
        raise UserError(
            f"optim.moments=bfloat16 with optim.b2={b2}: a bfloat16 number cannot fall by {1 - b2:.2g} of itself, so second "
            "moments would only rise; use b2=0.99 or less, or moments=float32"
        )


def offloaded(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """tx with moments in the host's pinned memory between steps: they travel to the device for the update and back.

    UserError where the backend has no such memory.
    """

    tx = optax.with_extra_args_support(tx)

    def move(to: Any, state: Any, params: Params) -> Any:
        return map_moments(lambda _, m, p: jax.device_put(m, to), state, params)

    def start(params: Params) -> Any:
        return move(jax.memory.Space.Host, tx.init(params), params)

    def update(grads: Any, state: Any, params: Params | None = None, **extra: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, move(jax.memory.Space.Device, state, grads), params, **extra)
        return updates, move(jax.memory.Space.Host, state, grads)

    check_host_memory("optim.offload=True")
    return optax.GradientTransformationExtraArgs(start, update)


def has_host_memory() -> bool:
    """Whether the backend can put arrays into pinned host memory."""
    return HOST in [m.kind for m in jax.devices()[0].addressable_memories()]


def check_host_memory(setting: str) -> None:
    """UserError when it cannot."""
    if not has_host_memory():
        there = ", ".join(m.kind for m in jax.devices()[0].addressable_memories())
        raise UserError(f"{setting}: the {jax.default_backend()} backend has no {HOST} memory, only {there}: leave it off")
