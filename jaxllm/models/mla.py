"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): the cache holds a latent for each position, not the heads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.core.sharding import shard
from jaxllm.core.spec import Spec, SpecTree
from jaxllm.models.attention import attend, head_norm, update
from jaxllm.models.layers import Frequencies, dense, norm, normal, rope


@dataclass(frozen=True)
class MLAConfig:
    """Widths: of the latents of queries (None: queries are projected directly) and of keys with values, and of one head's
    parts: without position, rotated, and value."""

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int


def specs(c: MLAConfig, d: int, h: int, residual_scale: float) -> SpecTree:
    """q_a, q_b (or q), kv_a, kv_b and o; kv_a gives the latent and the one rotated key that all heads share."""
    q_dim, heads = c.nope_dim + c.rope_dim, ("heads", None)
    tree: dict[str, Any] = {
        "kv_a": {"kernel": Spec((d, c.kv_rank + c.rope_dim), ("embed", None), normal(d))},
        "kv_a_norm": head_norm("rmsnorm", c.kv_rank),
        "kv_b": {"kernel": Spec((c.kv_rank, h, c.nope_dim + c.value_dim), (None, *heads), normal(c.kv_rank))},
        "o": {"kernel": Spec((h, c.value_dim, d), (*heads, "embed"), normal(h * c.value_dim, residual_scale))},
    }
    if c.q_rank is None:
        return tree | {"q": {"kernel": Spec((d, h, q_dim), ("embed", *heads), normal(d))}}
    return tree | {
        "q_a": {"kernel": Spec((d, c.q_rank), ("embed", None), normal(d))},
        "q_a_norm": head_norm("rmsnorm", c.q_rank),
        "q_b": {"kernel": Spec((c.q_rank, h, q_dim), (None, *heads), normal(c.q_rank))},
    }


def cache_shapes(c: MLAConfig) -> tuple[tuple[int, int], ...]:
    """(heads, width) of what a layer's cache holds of a position: the latent, and the rotated key."""
    return ((1, c.kv_rank), (1, c.rope_dim))


def apply(
    params: Any, c: MLAConfig, x: jax.Array, mask: jax.Array, *, positions: jax.Array, rotate: Frequencies,
    cache: Any = None, eps: float = 1e-6, scale: float | None = None,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """x [b, l, d] -> ([b, l, d], cache). cache: None, or (latents [b, 1, s, kv_rank], rotated keys [b, 1, s, rope_dim]).

    Without a cache keys and values of every head are formed from the latent. With one they never are: their projection is
    moved to the query and to the output (section 2.1.2 of the paper), which is multi-query attention over the latents.
    """
    if "q_a" in params:
        latent = norm(params["q_a_norm"], dense(x, "bld,dr->blr", params["q_a"]["kernel"]), eps)
        q = dense(latent, "blr,rhk->blhk", params["q_b"]["kernel"])
    else:
        q = dense(x, "bld,dhk->blhk", params["q"]["kernel"])
    q = shard(q, "batch", "length", "heads", None)
    q_nope, q_rope = q[..., : c.nope_dim], rope(q[..., c.nope_dim :], positions, rotate)
    both = dense(x, "bld,dr->blr", params["kv_a"]["kernel"])
    latent = norm(params["kv_a_norm"], both[..., : c.kv_rank], eps)
    k_rope = rope(both[:, :, None, c.kv_rank :], positions, rotate)
    expand = params["kv_b"]["kernel"].astype(x.dtype)
    scale = (c.nope_dim + c.rope_dim) ** -0.5 if scale is None else scale
    if cache is None:
        kv = shard(jnp.einsum("blr,rhk->blhk", latent, expand), "batch", "length", "heads", None)
        shared = jnp.broadcast_to(k_rope, (*kv.shape[:3], c.rope_dim))
        k = jnp.concatenate([kv[..., : c.nope_dim], shared], axis=-1).transpose(0, 2, 1, 3)
        v = kv[..., c.nope_dim :].transpose(0, 2, 1, 3)
        out = attend(jnp.concatenate([q_nope, q_rope], axis=-1), k, v, mask, scale=scale)
    else:
        write = mask.write if hasattr(mask, "write") else partial(update, positions=positions)
        cache = write(cache, (latent[:, None], k_rope.transpose(0, 2, 1, 3)))
        latents, keys = (part.astype(x.dtype) for part in cache)
        q_latent = jnp.einsum("blhk,rhk->blhr", q_nope, expand[..., : c.nope_dim])
        q, k = jnp.concatenate([q_latent, q_rope], axis=-1), jnp.concatenate([latents, keys], axis=-1)
        out = jnp.einsum("blhr,rhk->blhk", attend(q, k, latents, mask, scale=scale), expand[..., c.nope_dim :])
    return dense(out, "blhk,hkd->bld", params["o"]["kernel"]), cache
