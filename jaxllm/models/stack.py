"""Running equal layers one after another: one scan over stacked parameters, so depth does not change compile time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

POLICIES = {
    "none": None,  # keep every intermediate
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep matrix products, recompute the rest
    "full": jax.checkpoint_policies.nothing_saveable,  # keep only the layers' inputs
}


def run(block: Callable, layers: Any, x: jax.Array, cache: Any, *, remat: str, unroll: bool, tap: bool):
    """Apply block(layer_params, x, cache, index) -> (x, cache) for every layer.

    layers: parameters with a leading axis n. Returns (x, cache, inputs [n, b, l, d] or None). The cache is carried
    whole and updated in place; it is never sliced into the scan's inputs and outputs, which would copy it.
    """
    n = jax.tree.leaves(layers)[0].shape[0]

    def body(carry, xs):
        x, cache = carry
        params, index = xs
        return block(params, x, cache, index), x if tap else None

    if POLICIES[remat] is not None and cache is None:
        body = jax.checkpoint(body, policy=POLICIES[remat], prevent_cse=False)
    (x, cache), inputs = jax.lax.scan(body, (x, cache), (layers, jnp.arange(n)), unroll=n if unroll else 1)
    return x, cache, inputs
