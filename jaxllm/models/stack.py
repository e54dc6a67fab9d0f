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


def run(block: Callable, layers: Any, x: jax.Array, caches: Any, *, remat: str, unroll: bool, tap: bool):
    """Apply block(layer_params, x, cache) -> (x, cache) for every layer; (x, caches, inputs [n, b, l, d] or None).

    layers: parameters with a leading axis n, scanned; or, with caches (a list, one a layer), also a tuple of n trees
    (`core.spec.unstack`), which a decoding loop wants: slicing a layer out of a stack inside the loop copies its weights.
    """
    if caches is not None:
        return _each(block, layers, x, caches, tap)

    def body(x, params):
        return block(params, x, None)[0], x if tap else None

    if POLICIES[remat] is not None:
        body = jax.checkpoint(body, policy=POLICIES[remat], prevent_cse=False)
    x, inputs = jax.lax.scan(body, x, layers, unroll=jax.tree.leaves(layers)[0].shape[0] if unroll else 1)
    return x, None, inputs


def _each(block: Callable, layers: Any, x: jax.Array, caches: list, tap: bool):
    """One layer after another, each with its own cache."""
    inputs, new = [], []
    for i, cache in enumerate(caches):
        inputs.append(x)
        params = layers[i] if isinstance(layers, tuple) else jax.tree.map(lambda p, i=i: p[i], layers)
        x, cache = block(params, x, cache)
        new.append(cache)
    return x, new, jnp.stack(inputs) if tap else None
