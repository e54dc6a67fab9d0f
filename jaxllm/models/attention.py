"""Grouped-query attention under a mask: causal over packed segments, bidirectional, or across to another sequence."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from jaxllm.core.ops import product
from jaxllm.core.sharding import shard
from jaxllm.core.spec import Spec, SpecTree
from jaxllm.models import plain
from jaxllm.models.layers import Frequencies, dense, norm, norm_specs, normal, rope, zeros


@struct.dataclass
class KVCache:
    """What attention keeps of earlier positions: for each layer arrays [b, g, s, ...]; length int [b], the positions filled.

    A layer's arrays are its own: one stacked array is copied at every step of a decoding loop. A slot's index is
    its position, so right-padded prompts of unequal length need no mask of their own: a query at position p sees slots
    0..p, and what padding left beyond is overwritten before it is ever seen.
    """

    layers: tuple[tuple[jax.Array, ...], ...]
    length: jax.Array

    def mask(self, positions: jax.Array, window: int = 0) -> Any:
        """What queries at positions int [b, l] see of the slots: bool [b, l, s]."""
        return cache_mask(positions, self.layers[0][0].shape[2], window)


def init_cache(layers: int, batch: int, length: int, shapes: tuple[tuple[int, int], ...], dtype: Any) -> KVCache:
    """An empty cache; `shapes`: (heads, width) of each array of a layer, ((g, k), (g, k)) for keys and values."""
    one = lambda: tuple(jnp.zeros((batch, heads, length, width), dtype) for heads, width in shapes)  # noqa: E731
    return KVCache(tuple(one() for _ in range(layers)), jnp.zeros(batch, jnp.int32))


def specs(
    d: int, h: int, g: int, k: int, bias: bool, residual_scale: float, *,
    out_bias: bool | None = None, norm: str | None = None, source: int | None = None,
) -> SpecTree:  # fmt: skip
    """Query, key, value and output projections; `norm`: the kind of norm on each head's queries and keys (Qwen3, Gemma 3);
    `source`: the width that keys and values read, where it is not d."""
    s = source or d
    tree = {
        "q": {"kernel": Spec((d, h, k), ("embed", "heads", None), normal(d))},
        "k": {"kernel": Spec((s, g, k), ("embed", "kv_heads", None), normal(s))},
        "v": {"kernel": Spec((s, g, k), ("embed", "kv_heads", None), normal(s))},
        "o": {"kernel": Spec((h, k, d), ("heads", None, "embed"), normal(h * k, residual_scale))},
    }
    if bias:
        tree["q"]["bias"] = Spec((h, k), ("heads", None), zeros)
        tree["k"]["bias"] = Spec((g, k), ("kv_heads", None), zeros)
        tree["v"]["bias"] = Spec((g, k), ("kv_heads", None), zeros)
    if bias if out_bias is None else out_bias:
        tree["o"]["bias"] = Spec((d,), ("embed",), zeros)
    if norm is not None:
        tree["q_norm"], tree["k_norm"] = head_norm(norm, k), head_norm(norm, k)
    return tree


def head_norm(kind: str, k: int) -> SpecTree:
    """A norm over a head's width, which no rule shards."""
    return jax.tree.map(lambda s: Spec(s.shape, (None,), s.init), norm_specs(kind, k))


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *, scale: float | None = None, bias: jax.Array | None = None,
    softcap: float | None = None,
) -> jax.Array:  # fmt: skip
    """softmax(scale q k^T + bias, where mask) v with the softmax in float32 (arXiv 1706.03762).

    q [b, l, h, k]; k [b, g, s, k], v [b, g, s, w] with g dividing h; mask bool [b, l, s]; bias [h, l, s] or
    [b, h, l, s] -> [b, l, h, w].
    scale: k ** -0.5. softcap: c tanh(scores / c) (Gemma 2). A mask may be a record that knows its attention (`kernels`).
    """
    if hasattr(mask, "attend"):
        return mask.attend(q, k, v, scale=scale, bias=bias, softcap=softcap)
    if bias is None and softcap is None:
        return plain.attend(q, k, v, mask, scale=scale)
    b, length, h, dim = q.shape
    g, width = k.shape[1], v.shape[-1]
    # plain batched products, as in `plain`: heads before length, and a group's queries one after another on the length axis
    q = (q * (dim**-0.5 if scale is None else scale)).reshape(b, length, g, h // g, dim)
    q = q.transpose(0, 2, 3, 1, 4).reshape(b, g, -1, dim)
    scores = product("bglk,bgsk->bgls", q, k)
    scores = scores.reshape(b, h, length, -1)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores = scores + (bias if bias.ndim == 4 else bias[None]).astype(jnp.float32)
    scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(b, g, -1, k.shape[2])
    out = jnp.einsum("bgls,bgsk->bglk", weights, v)
    return checkpoint_name(out.reshape(b, h, length, width).transpose(0, 2, 1, 3), "attention_out")


def causal_mask(segments: jax.Array, window: int = 0) -> jax.Array:
    """[b, l] -> bool [b, l, l]: a position sees itself and earlier ones of its own segment, `window` in all when above 0."""
    index = jnp.arange(segments.shape[1])
    ahead = index[:, None] - index[None, :]
    seen = (ahead >= 0) & (ahead < window) if window else ahead >= 0
    return seen[None] & (segments[:, :, None] == segments[:, None, :])


def cache_mask(positions: jax.Array, slots: int, window: int = 0) -> jax.Array:
    """[b, l] -> bool [b, l, s] over a cache whose slot index is the position."""
    ahead = positions[:, :, None] - jnp.arange(slots)[None, None, :]
    return (ahead >= 0) & (ahead < window) if window else ahead >= 0


def full_mask(segments: jax.Array, source: jax.Array | None = None) -> jax.Array:
    """[b, l] and [b, s] (default: the same) -> bool [b, l, s]: both in one segment, and not padding."""
    source = segments if source is None else source
    return (segments[:, :, None] == source[:, None, :]) & (source != 0)[:, None, :]


def keys_values(params: Any, source: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values [b, g, s, k] of what cross-attention reads, [b, s, d]."""
    k, v = (
        shard(dense(source, "bsd,dgk->bsgk", params[n]["kernel"], params[n].get("bias")), "batch", "length", "kv_heads", None)
        for n in "kv"
    )
    return k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)


def cross(
    params: Any, x: jax.Array, kv: tuple[jax.Array, jax.Array], mask: jax.Array, *,
    scale: float | None = None, bias: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """Attention of x [b, l, d] over the keys and values of another sequence: mask bool [b, l, s] -> [b, l, d]."""
    q = shard(dense(x, "bld,dhk->blhk", params["q"]["kernel"], params["q"].get("bias")), "batch", "length", "heads", None)
    out = attend(q, *(c.astype(x.dtype) for c in kv), mask, scale=scale, bias=bias)
    return dense(out, "blhk,hkd->bld", params["o"]["kernel"], params["o"].get("bias"))


def update(cache: tuple[jax.Array, ...], new: tuple[jax.Array, ...], positions: jax.Array) -> tuple[jax.Array, ...]:
    """A layer's cache [b, g, s, ...] with new entries [b, g, l, ...] in the slots of `positions` [b, l]."""
    slot = (jnp.arange(positions.shape[0])[:, None], slice(None), positions)  # indexes as [b, l, g, k]
    # beyond the cache's end (padding only: see decoder.apply) writes are dropped, never wrapped
    return tuple(
        old.at[slot].set(x.transpose(0, 2, 1, 3).astype(old.dtype), mode="drop") for old, x in zip(cache, new, strict=True)
    )


def apply(
    params: Any, x: jax.Array, mask: jax.Array, *, positions: jax.Array | None = None, rotate: Frequencies | None = None,
    cache: Any = None, eps: float = 1e-6, scale: float | None = None, bias: jax.Array | None = None,
    softcap: float | None = None,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """One layer's self-attention: x [b, l, d] -> ([b, l, d], this layer's cache with the new slots).

    cache: None, or (k, v), each [b, g, s, k]; then `mask` is [b, l, s] over its slots and `positions` says which slots the
    new keys take.
    """
    q, k, v = (
        shard(dense(x, "bld,dhk->blhk", params[n]["kernel"], params[n].get("bias")), "batch", "length", axis, None)
        for n, axis in (("q", "heads"), ("k", "kv_heads"), ("v", "kv_heads"))
    )
    if "q_norm" in params:
        q, k = norm(params["q_norm"], q, eps), norm(params["k_norm"], k, eps)
    if rotate is not None:
        q, k = rope(q, positions, rotate), rope(k, positions, rotate)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    if cache is not None:
        cache = (mask.write if hasattr(mask, "write") else partial(update, positions=positions))(cache, (k, v))
        k, v = (c.astype(x.dtype) for c in cache)
    out = attend(q, k, v, mask, scale=scale, bias=bias, softcap=softcap)
    return dense(out, "blhk,hkd->bld", params["o"]["kernel"], params["o"].get("bias")), cache
