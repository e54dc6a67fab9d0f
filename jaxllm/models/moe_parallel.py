"""A mixture of experts on a mesh: tokens are split over all devices that hold data or experts, and travel to their experts."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxllm.core.types import UserError
from jaxllm.models import experts

ROWS = ("data", "fsdp", "expert")  # the mesh axes that rows of tokens are split over; their length lies on `context`


def run(local: Callable, params: Any, x: jax.Array, used: jax.Array, n: int) -> tuple[jax.Array, Any]:
    """local(params, x [t, d], used [t], experts) -> (y [t, d], sums) on every device's tokens of x [b, l, d], used [b, l].

    Gives y [b, l, d], and the sums of all devices. Without a mesh, and inside `jax.shard_map`, that is `local` on all tokens.
    On a mesh params' experts lie on the axis `expert` and are never gathered over it; their width lies on `tensor`. Raises
    UserError when experts or tokens do not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return _flat(local, params, x, used, experts.apply)
    owners = mesh.shape["expert"]
    if n % owners:
        raise UserError(f"mesh.expert={owners} does not divide model.moe.n_experts={n}: use a divisor")
    if (found := _layout(mesh, x.shape)) is None:
        if owners == 1:
            return _flat(local, params, x, used, experts.apply)
        shards = math.prod(mesh.shape[a] for a in (*ROWS, "context"))
        raise UserError(
            f"{x.shape[0] * x.shape[1]} tokens ({x.shape[0]} x {x.shape[1]}) do not divide over mesh data x fsdp x expert x "
            f"context = {shards}: use a multiple"
        )
    shape, tokens = found
    over = tuple(name for part in tokens if part for name in ((part,) if isinstance(part, str) else part))

    def device(params: Any, x: jax.Array, used: jax.Array):
        y, sums = _flat(local, params, x, used, functools.partial(exchange, owners) if owners > 1 else experts.apply)
        return jax.lax.psum(y, "tensor"), jax.lax.psum(sums, over)

    params = {name: params[name] for name in ("router", "experts")}
    where = {
        "router": PartitionSpec(),
        "experts": jax.tree.map(lambda _: PartitionSpec("expert", None, "tensor"), params["experts"]),
    }
    where["experts"]["down"] = {"kernel": PartitionSpec("expert", "tensor", None)}
    where["router"] = jax.tree.map(lambda _: PartitionSpec(), params["router"])
    spread = jax.shard_map(device, in_specs=(where, tokens, tokens), out_specs=(tokens, PartitionSpec()))
    y, sums = spread(params, x.reshape(*shape, -1), used.reshape(shape))
    return y.reshape(x.shape), sums


def _flat(local: Callable, params: Any, x: jax.Array, used: jax.Array, product: Callable) -> tuple[jax.Array, Any]:
    y, sums = local(params, x.reshape(-1, x.shape[-1]), used.reshape(-1), product)
    return y.reshape(x.shape), sums


def _layout(mesh: Any, shape: tuple[int, ...]) -> tuple[tuple[int, int], PartitionSpec] | None:
    """How tokens [b, l] are split: (the shape to give them, its axes), so that none of them travels; None: they do not divide."""
    b, length = shape[:2]
    size = lambda *names: math.prod(mesh.shape[n] for n in names)  # noqa: E731
    if b % size(*ROWS) == 0 and length % size("context") == 0:
        return (b, length), PartitionSpec(ROWS, "context")
    if b % size("data", "fsdp") == 0 and length % size("context", "expert") == 0:
        return (b, length), PartitionSpec(("data", "fsdp"), ("context", "expert"))
    if size("context") == 1 and b * length % size(*ROWS) == 0:
        return (b * length, 1), PartitionSpec(ROWS, None)
    return None


def exchange(owners: int, params: Any, kind: str, x: jax.Array, slots: jax.Array, *, n: int, k: int, capacity: int | None):
    """`experts.apply` where each of `owners` devices holds n / owners experts: slots go to their owner and come back.

    Dropless, a device sends every other one a buffer that always suffices: t * min(k, n / owners) rows, t its own tokens.
    With a capacity it sends n / owners * capacity rows, and each expert computes `capacity` of every device.
    """
    own = n // owners
    if capacity is not None:
        layout = experts.capacity_layout(slots, n, capacity)
        rows = _swap(experts.take(x, layout, k), owners).reshape(owners, own, capacity, -1)
        rows = rows.transpose(1, 0, 2, 3).reshape(own * owners * capacity, -1)
        y = experts.network(params, kind, rows, functools.partial(experts.batched, own))
        y = y.reshape(own, owners, capacity, -1).transpose(1, 0, 2, 3).reshape(n * capacity, -1)
    else:
        layout = experts.capacity_layout(slots // own, owners, x.shape[0] * min(k, own))
        arrived = _swap(experts.take(x, layout, k), owners)
        local = slots.at[layout.source].get(mode="fill", fill_value=n) % own
        local = _swap(jnp.where(layout.source < slots.shape[0], local, own), owners)
        y, _ = experts.apply(params, kind, arrived, local, n=own, k=1)
    return experts.put_back(_swap(y, owners), layout), layout.kept


def _swap(rows: jax.Array, owners: int) -> jax.Array:
    """[owners * m, ...]: part i goes to device i of the axis `expert`, and part j of the result came from device j."""
    return jax.lax.all_to_all(rows, "expert", split_axis=0, concat_axis=0, tiled=True)
