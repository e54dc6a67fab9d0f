"""T5's relative positions: a learned logit a head for each bucket of distances (arXiv 1910.10683, section 2.1)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core.spec import Spec, SpecTree
from jaxllm.models.layers import normal


def specs(buckets: int, h: int, d: int) -> SpecTree:
    """One table for all layers of a stack; a leaf called bias, so that weight decay leaves it alone."""
    return {"bias": Spec((buckets, h), (None, "heads"), normal(d))}


@functools.cache
def distance_buckets(buckets: int, max_distance: int) -> np.ndarray:
    """int32 [max_distance + 1]: the bucket of a distance 0, 1, ...; what lies further is in the last one.

    The first half of the buckets holds one distance each; the k others begin at half * (max_distance / half) ** (i / k).
    Their bounds are found as whole numbers: a float32 logarithm may put one that is a whole number on the wrong side.
    """
    half = buckets // 2
    k = buckets - half
    bounds = np.ceil(half * (max_distance / half) ** (np.arange(1, k) / k) - 1e-6)
    distance = np.arange(max_distance + 1)
    large = half + np.searchsorted(bounds, distance, side="right")
    return np.where(distance < half, distance, large).astype(np.int32)


def bucket(relative: jax.Array, *, bidirectional: bool, buckets: int, max_distance: int) -> jax.Array:
    """Bucket ids of relative positions (key minus query), any shape.

    Bidirectional: half of the buckets for keys at or before the query, half for those after it. Otherwise keys ahead of the
    query share bucket 0 with the query's own position: a causal mask hides them.
    """
    n = buckets // 2 if bidirectional else buckets
    distance = jnp.abs(relative) if bidirectional else jnp.maximum(-relative, 0)
    ids = jnp.asarray(distance_buckets(n, max_distance))[jnp.minimum(distance, max_distance)]
    return jnp.where(relative > 0, ids + n, ids) if bidirectional else ids


def bias(table: jax.Array, queries: jax.Array, keys: jax.Array, *, bidirectional: bool, max_distance: int) -> jax.Array:
    """What is added to attention scores: table [buckets, h], positions [l] or [b, l] and [s] -> [h, l, s] or [b, h, l, s]."""
    relative = keys.reshape((1,) * queries.ndim + (-1,)) - queries[..., None]
    ids = bucket(relative, bidirectional=bidirectional, buckets=table.shape[0], max_distance=max_distance)
    return jnp.moveaxis(table[ids], -1, -3)
