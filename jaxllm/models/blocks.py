"""Attention in blocks of queries and keys: no array of length x length, forwards or backwards, on any backend.

The softmax goes over the blocks of keys with a running maximum and sum (arXiv 2112.05682, 2205.14135); the backward pass forms
each block's weights again from the saved log-sum-exp. Where the length is split over devices, keys and values travel around
them in a ring, a step for each device (arXiv 2310.01889), and in the backward pass their gradients travel with them. Blocks in
which no query sees a key (later ones under a causal mask, earlier ones beyond a window) are not computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from jaxllm.core.sharding import activation_axes

BLOCK = 512  # queries, and keys, of a block at most
LOWEST = -1e30  # the maximum of no scores: finite, so that a row which sees nothing gives 0 and no NaN


@dataclass(frozen=True)
class Layout:
    """What is known before the arrays are: which positions see which, the block's size, and how the arrays lie on a mesh.

    rows, ring, heads: the mesh axes that the batch, the length and the heads are split over. mesh: every device runs on its
    own part, in `jax.shard_map`.
    """

    causal: bool
    window: int
    softcap: float | None
    block: int
    mesh: bool = False
    rows: tuple[str, ...] | None = None
    ring: tuple[str, ...] = ()
    heads: tuple[str, ...] | None = None
    devices: int = 1  # of the ring


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, *, causal: bool, window: int = 0,
    scale: float | None = None, softcap: float | None = None, block: int = BLOCK, ring: bool = False,
) -> jax.Array:  # fmt: skip
    """softmax(scale q k^T) v over the keys that each query sees (see `kernels.Seen`).

    q [b, l, h, k]; k [b, g, l, k], v [b, g, l, w] with g dividing h; segments int [b, l] or None -> [b, l, h, w]. A query that
    sees nothing gives 0. ring: the length is split over the mesh axes of `length`, which must divide it.
    """
    b, length, h, dim = q.shape
    layout = _layout(q, causal, window if causal else 0, softcap, block, ring)
    q = (q * (dim**-0.5 if scale is None else scale)).transpose(0, 2, 1, 3)
    k, v = (spread_heads(x, layout.heads) for x in (k, v))
    own = other = segments
    if extra := -length % (layout.block * layout.devices):
        own = jnp.ones((b, length), jnp.int32) if segments is None else segments
        own, other = (jnp.pad(own, ((0, 0), (0, extra)), constant_values=n) for n in (-2, -1))
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, extra), (0, 0))) for x in (q, k, v))
    return _attend(layout, q, k, v, own, other)[:, :, :length].transpose(0, 2, 1, 3)


def _layout(q: jax.Array, causal: bool, window: int, softcap: float | None, block: int, ring: bool) -> Layout:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return Layout(causal, window, softcap, _size(q.shape[1], block))
    rows, axes, heads, _ = activation_axes(("batch", "length" if ring else None, "heads", None), q.shape, mesh)
    devices = math.prod(mesh.shape[n] for n in axes or ())
    return Layout(causal, window, softcap, _size(q.shape[1] // devices, block), True, rows, axes or (), heads, devices)


def _size(length: int, most: int) -> int:
    """The block's size: the fewest blocks of at most so many positions, as even as they come."""
    return -(-length // -(-length // most))


def spread_heads(x: jax.Array, axes: tuple[str, ...] | None) -> jax.Array:
    """Keys or values [b, g, ...] with each head so often that mesh axes which split the queries' heads split these too."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = math.prod(mesh.shape[n] for n in axes or ())
    copies = devices // math.gcd(x.shape[1], devices)
    return x if copies == 1 else jnp.repeat(x, copies, axis=1)


# ---- one function with its own gradient, on a mesh or on one device


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(layout: Layout, q: Any, k: Any, v: Any, own: Any, other: Any) -> jax.Array:
    """q [b, h, l, k] (scaled), k [b, g, l, k], v [b, g, l, w], segments of queries and of keys [b, l] -> [b, h, l, w]."""
    return _forward(layout, q, k, v, own, other)[0]


def _forward(layout: Layout, q: Any, k: Any, v: Any, own: Any, other: Any) -> tuple[jax.Array, Any]:
    out, total = _spread(layout, _local_forward, "qkkss", "qt")(q, k, v, own, other)
    # remat policies can keep these two by name: without them the backward pass runs the forward one again
    out, total = checkpoint_name(out, "attention_out"), checkpoint_name(total, "attention_total")
    return out, (q, k, v, own, other, out, total)


def _backward(layout: Layout, kept: Any, grad: jax.Array) -> tuple:
    gradients = _spread(layout, _local_backward, "qkkssqtq", "qkk")(*kept, grad)
    return *gradients, None, None


_attend.defvjp(_forward, _backward)


def _spread(layout: Layout, local: Any, inputs: str, outputs: str) -> Any:
    """`local` on every device's part of the arrays. q, k: [b, heads, l, ...]; t: [b, heads, l]; s: segments [b, l]."""
    if not layout.mesh:
        return partial(local, layout)
    rows, ring, heads = layout.rows, layout.ring or None, layout.heads
    where = {name: PartitionSpec(rows, heads, ring, None) for name in "qk"}
    where |= {"t": PartitionSpec(rows, heads, ring), "s": PartitionSpec(rows, ring)}
    pick = lambda names: tuple(where[n] for n in names)  # noqa: E731
    # every gradient is formed by hand, so nothing has to be known about what varies over which axis
    return jax.shard_map(partial(local, layout), in_specs=pick(inputs), out_specs=pick(outputs), check_vma=False)


def _place(layout: Layout, step: int, length: int) -> tuple[Any, Any]:
    """(The position of the first query here, that of the first key that is here after `step` steps of the ring)."""
    if not layout.ring:
        return 0, 0
    index = jax.lax.axis_index(layout.ring)
    return index * length, (index - step) % layout.devices * length


def _pass_on(layout: Layout, tree: Any) -> Any:
    """Every device's arrays to the next one of the ring."""
    to = [(i, (i + 1) % layout.devices) for i in range(layout.devices)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, layout.ring, to), tree)


def _local_forward(layout: Layout, q: Any, k: Any, v: Any, own: Any, other: Any) -> tuple[jax.Array, jax.Array]:
    """(out [b, h, l, w], the log-sum-exp of each query's scores [b, h, l] in float32) of this device's queries."""
    b, h, length, dim = q.shape
    q = q.reshape(b, k.shape[1], -1, length, dim)
    shape = q.shape[:4]
    state = (
        jnp.zeros((*shape, v.shape[-1]), jnp.float32), jnp.full(shape, LOWEST, jnp.float32), jnp.zeros(shape, jnp.float32)
    )  # fmt: skip
    travelling = (k, v, other)
    for step in range(layout.devices):
        following = _pass_on(layout, travelling) if step + 1 < layout.devices else None
        state = _fold(layout, _place(layout, step, length), q, own, *travelling, state)
        travelling = following
    out, top, total = state
    total = jnp.where(total == 0, 1.0, total)
    out = (out / total[..., None]).astype(v.dtype)
    return out.reshape(b, h, length, -1), (top + jnp.log(total)).reshape(b, h, length)


def _local_backward(layout: Layout, q, k, v, own, other, out, total, grad) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of q, k and v. Those of keys and values go around the ring with them, and are home after the last step."""
    b, h, length, dim = q.shape
    group = lambda x: x.reshape(b, k.shape[1], -1, *x.shape[2:])  # noqa: E731
    inner = jnp.sum(out.astype(jnp.float32) * grad.astype(jnp.float32), axis=-1)
    queries = (group(q), group(grad), group(total), group(inner))
    dq = jnp.zeros(queries[0].shape, jnp.float32)
    travelling, grads = (k, v, other), tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    for step in range(layout.devices):
        following = _pass_on(layout, travelling) if step + 1 < layout.devices else None
        dq, *grads = _unfold(layout, _place(layout, step, length), queries, own, *travelling, (dq, *grads))
        grads = _pass_on(layout, grads) if layout.ring else grads
        travelling = following
    return dq.reshape(q.shape).astype(q.dtype), grads[0].astype(k.dtype), grads[1].astype(v.dtype)


# ---- blocks


def _part(x: jax.Array, number: Any, size: int, axis: int) -> jax.Array:
    """Block `number` of an axis."""
    return jax.lax.dynamic_slice_in_dim(x, number * size, size, axis)


def _put(x: jax.Array, part: jax.Array, number: Any, size: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part, number * size, axis)


def _needed(layout: Layout, place: tuple[Any, Any], number: Any, blocks: int) -> tuple[Any, Any]:
    """The first block of keys that some query of block `number` may see, and the one after the last."""
    first = place[0] - place[1] + number * layout.block  # of the queries, counted from the first key
    low = (first - layout.window + 1) // layout.block if layout.window else 0
    high = first // layout.block + 1 if layout.causal else blocks
    return jnp.clip(low, 0, blocks), jnp.clip(high, 0, blocks)


def _scores(layout: Layout, q: Any, k: Any, first: tuple[Any, Any], own: Any, other: Any) -> tuple[jax.Array, jax.Array]:
    """(The scores of a block [b, g, r, q, s] after the softcap in float32, and in which of them a query sees the key)."""
    scores = jnp.einsum("bgrqk,bgsk->bgrqs", q, k, preferred_element_type=jnp.float32)
    if layout.softcap is not None:
        scores = layout.softcap * jnp.tanh(scores / layout.softcap)
    at = jnp.arange(layout.block)
    ahead = (first[0] + at)[:, None] - (first[1] + at)[None, :]
    seen = ahead >= 0 if layout.causal else jnp.ones_like(ahead, bool)
    seen = (seen & (ahead < layout.window) if layout.window else seen)[None]
    if own is not None:
        seen = seen & (own[:, :, None] == other[:, None, :])
        seen = seen if layout.causal else seen & (other != 0)[:, None, :]
    return scores, jnp.broadcast_to(seen[:, None, None], scores.shape)


def _pieces(layout: Layout, place: tuple[Any, Any], i: Any, j: Any, own: Any, other: Any) -> tuple:
    """For a block of queries and one of keys: (the positions of their first, the segments of each)."""
    n = layout.block
    segments = (None, None) if own is None else (_part(own, i, n, 1), _part(other, j, n, 1))
    return (place[0] + i * n, place[1] + j * n), *segments


def _fold(layout: Layout, place: tuple[Any, Any], q: Any, own: Any, k: Any, v: Any, other: Any, state: tuple) -> tuple:
    """(Weighted values, maxima, sums) of all queries with the keys that are here added to them."""
    n, blocks = layout.block, k.shape[2] // layout.block

    def one(i, state):
        mine = _part(q, i, n, 3)

        def fold(j, part):
            out, top, total = part
            scores, seen = _scores(layout, mine, _part(k, j, n, 2), *_pieces(layout, place, i, j, own, other))
            scores = jnp.where(seen, scores, -jnp.inf)
            higher = jnp.maximum(top, scores.max(axis=-1))
            weights, shrink = jnp.exp(scores - higher[..., None]), jnp.exp(top - higher)
            values = jnp.einsum(
                "bgrqs,bgsw->bgrqw", weights.astype(v.dtype), _part(v, j, n, 2), preferred_element_type=jnp.float32
            )
            return out * shrink[..., None] + values, higher, total * shrink + weights.sum(axis=-1)

        part = jax.lax.fori_loop(*_needed(layout, place, i, blocks), fold, tuple(_part(x, i, n, 3) for x in state))
        return tuple(_put(x, y, i, n, 3) for x, y in zip(state, part, strict=True))

    return jax.lax.fori_loop(0, q.shape[3] // n, one, state)


def _unfold(layout: Layout, place: tuple[Any, Any], queries: tuple, own: Any, k: Any, v: Any, other: Any, grads: tuple) -> tuple:
    """The gradients of queries, keys and values with what these keys add. queries: (q, gradient, log-sum-exp, out . gradient).

    p = exp(scores - lse); dv = p^T g; ds = p (g v^T - out . g); dq = ds k; dk = ds^T q (arXiv 2205.14135, appendix B).
    """
    n, blocks = layout.block, k.shape[2] // layout.block
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def one(i, grads):
        q, g, total, inner = (_part(x, i, n, 3) for x in queries)

        def unfold(j, part):
            dq, dk, dv = part
            keys, values = _part(k, j, n, 2), _part(v, j, n, 2)
            scores, seen = _scores(layout, q, keys, *_pieces(layout, place, i, j, own, other))
            weights = jnp.exp(jnp.where(seen, scores, -jnp.inf) - total[..., None])
            ds = weights * (product("bgrqw,bgsw->bgrqs", g, values) - inner[..., None])
            if layout.softcap is not None:
                ds = ds * (1 - (scores / layout.softcap) ** 2)
            ds, weights = ds.astype(q.dtype), weights.astype(v.dtype)
            dk_here = _part(dk, j, n, 2) + product("bgrqs,bgrqk->bgsk", ds, q)
            dv_here = _part(dv, j, n, 2) + product("bgrqs,bgrqw->bgsw", weights, g)
            return dq + product("bgrqs,bgsk->bgrqk", ds, keys), _put(dk, dk_here, j, n, 2), _put(dv, dv_here, j, n, 2)

        dq, dk, dv = grads
        part = jax.lax.fori_loop(*_needed(layout, place, i, blocks), unfold, (_part(dq, i, n, 3), dk, dv))
        return _put(dq, part[0], i, n, 3), *part[1:]

    return jax.lax.fori_loop(0, queries[0].shape[3] // n, one, grads)
