"""Pairs whose labels are changed, and strings in halves."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.core.types import Batch

SWAPPED = {
    "chosen": "rejected", "rejected": "chosen",
    "ref_chosen_logps": "ref_rejected_logps", "ref_rejected_logps": "ref_chosen_logps",
}  # fmt: skip


def swapped(pairs: Batch, swap: jax.Array) -> Batch:
    """Pairs with the two sides exchanged where swap is True: bool [n]."""
    choose = lambda x, y: jnp.where(swap.reshape(-1, *([1] * (x.ndim - 1))), y, x)  # noqa: E731
    return {name: jax.tree.map(choose, pairs[name], pairs[other]) for name, other in SWAPPED.items()}


def halves(record: Batch) -> tuple[Batch, Batch]:
    """The first and the second half of the rows: one sampling of 2n strings compiles in half the time of two."""
    n = jax.tree.leaves(record)[0].shape[0] // 2
    return jax.tree.map(lambda x: x[:n], record), jax.tree.map(lambda x: x[n:], record)
