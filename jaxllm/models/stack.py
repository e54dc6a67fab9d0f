"""Running layers one after another: one scan over stacked parameters, so depth does not change compile time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

KEPT = jax.checkpoint_policies
# what the backward pass finds in memory, from the least recomputation to the most; `attention_total`: what fused attention
# needs beside its output
POLICIES = {
    "none": None,  # every intermediate
    "dots": KEPT.dots_with_no_batch_dims_saveable,  # products with weights; the rest is recomputed
    "attention": KEPT.save_only_these_names("attention_out", "attention_total"),  # attention's outputs and the layers' inputs
    "full": KEPT.nothing_saveable,  # the layers' inputs
    "offload": KEPT.save_and_offload_only_these_names(  # the layers' inputs, in the host's memory
        names_which_can_be_saved=[], names_which_can_be_offloaded=["layer_input"], offload_src="device", offload_dst="pinned_host"
    ),
}


def run(
    blocks: Callable | Sequence[Callable], layers: Any, x: jax.Array, caches: Any = None, *,
    remat: str = "none", unroll: bool = False, tap: bool = False,
) -> tuple[jax.Array, Any, dict[str, Any]]:  # fmt: skip
    """Apply block(layer_params, x, cache) -> (x, cache, aux) for every layer: (x, caches, aux stacked to [n, ...]).

    blocks: one for all layers, or the pattern that repeats over them (Gemma's local and global attention): layer i runs
    blocks[i % p], and the scan goes over groups of p layers. layers: parameters with a leading axis n, or a tuple of n trees
    (`core.spec.unstack`), which a decoding loop wants: slicing a layer out of a stack inside the loop copies its weights.
    With caches (a list, one a layer) layers run in a Python loop. tap: aux also has layer_inputs [n, b, l, d].
    """
    blocks = (blocks,) if callable(blocks) else tuple(blocks)
    n = len(layers) if isinstance(layers, tuple) else jax.tree.leaves(layers)[0].shape[0]
    if caches is not None or isinstance(layers, tuple):
        return _each(blocks, layers, x, [None] * n if caches is None else caches, tap)
    p, groups = len(blocks), n // len(blocks)
    x, aux = _scan(blocks, _part(layers, 0, groups * p, n), x, groups, remat, unroll, tap)
    if rest := n - groups * p:
        x, more = _scan(blocks[:rest], _part(layers, groups * p, n, n), x, 1, remat, unroll, tap)
        aux = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), aux, more) if groups else more
    return x, None, aux


def _part(layers: Any, start: int, stop: int, n: int) -> Any:
    return layers if (start, stop) == (0, n) else jax.tree.map(lambda a: a[start:stop], layers)


def _remat(block: Callable, remat: str, inline: bool) -> Callable:
    if POLICIES[remat] is None:
        return block

    def named(params: Any, x: jax.Array, cache: Any) -> Any:
        return block(params, checkpoint_name(x, "layer_input"), cache)

    # outside a loop the compiler would find the forward pass's values and keep them instead of recomputing
    return jax.checkpoint(named, policy=POLICIES[remat], prevent_cse=inline)


def _scan(
    blocks: tuple, layers: Any, x: jax.Array, groups: int, remat: str, unroll: bool, tap: bool
) -> tuple[jax.Array, Any]:  # fmt: skip
    """Groups of len(blocks) layers: (x, aux [n, ...])."""
    p = len(blocks)
    if groups == 0:
        return x, {}
    blocks = tuple(_remat(block, remat, unroll or groups == 1) for block in blocks)

    def body(x: jax.Array, group: Any) -> tuple[jax.Array, Any]:
        found = []
        for i, block in enumerate(blocks):
            params = group if p == 1 else jax.tree.map(lambda a, i=i: a[i], group)
            y, _, aux = block(params, x, None)
            found.append({**aux, "layer_inputs": x} if tap else aux)
            x = y
        return x, found[0] if p == 1 else jax.tree.map(lambda *a: jnp.stack(a), *found)

    grouped = layers if p == 1 else jax.tree.map(lambda a: a.reshape(groups, p, *a.shape[1:]), layers)
    x, aux = jax.lax.scan(body, x, grouped, unroll=groups if unroll else 1)
    return x, aux if p == 1 else jax.tree.map(lambda a: a.reshape(groups * p, *a.shape[2:]), aux)


def _each(blocks: tuple, layers: Any, x: jax.Array, caches: list, tap: bool) -> tuple[jax.Array, list, dict[str, Any]]:
    """One layer after another, each with its own cache."""
    found, new = [], []
    for i, cache in enumerate(caches):
        params = layers[i] if isinstance(layers, tuple) else jax.tree.map(lambda p, i=i: p[i], layers)
        y, cache, aux = blocks[i % len(blocks)](params, x, cache)
        found.append({**aux, "layer_inputs": x} if tap else aux)
        new.append(cache)
        x = y
    return x, new, jax.tree.map(lambda *a: jnp.stack(a), *found)
