"""A cache in pages: a row holds as many as its tokens need, and attention walks the pool where it lies (arXiv 2309.06180)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxllm.core.types import Model, UserError
from jaxllm.models.attention import KVCache


@struct.dataclass
class PagedCache:
    """What attention keeps, for b rows in one pool: for each layer arrays [pages, g, page, ...].

    owner int [pages]: the row that holds a page (-1: none); start int [pages]: the position of its first slot; length int [b],
    the positions filled. It stands in the place of an `attention.KVCache`: a call costs the pool, not rows x the longest.
    """

    layers: tuple[tuple[jax.Array, ...], ...]
    owner: jax.Array
    start: jax.Array
    length: jax.Array

    @property
    def page(self) -> int:
        """Slots of a page."""
        return self.layers[0][0].shape[2]

    def mask(self, positions: jax.Array, window: int = 0) -> PagedMask:
        """What queries at positions int [b, l] see, and where the new keys at these positions go."""
        first = positions - positions % self.page
        rows = jnp.arange(positions.shape[0])
        held = (self.owner[None, None, :] == rows[:, None, None]) & (self.start[None, None, :] == first[:, :, None])
        # without a page (a row that holds none, or padding beyond its last) what is written is dropped
        place = jnp.where(held.any(axis=-1), jnp.argmax(held, axis=-1), self.owner.shape[0])
        return PagedMask(positions, place, self.owner, self.start, window)

    def admit(self, row: jax.Array, one: KVCache, tokens: jax.Array) -> PagedCache:
        """Row `row` takes free pages for `tokens` positions and what a cache of one row holds; there must be enough of them."""
        free = self.owner < 0
        number = jnp.cumsum(free) - 1  # a free page's place among those that the row takes
        taken = free & (number * self.page < tokens)
        pages = one.layers[0][0].shape[2] // self.page
        index = jnp.nonzero(taken, size=pages, fill_value=taken.shape[0])[0]

        def put(pool: jax.Array, x: jax.Array) -> jax.Array:
            cut = x[0].reshape(x.shape[1], pages, self.page, x.shape[3]).swapaxes(0, 1)
            return pool.at[index].set(cut.astype(pool.dtype), mode="drop")

        return self.replace(
            layers=jax.tree.map(put, self.layers, one.layers), owner=jnp.where(taken, row, self.owner),
            start=jnp.where(taken, number * self.page, self.start), length=self.length.at[row].set(one.length[0], mode="drop"),
        )  # fmt: skip

    def release(self, rows: jax.Array) -> PagedCache:
        """Without the pages of the rows bool [b]."""
        return self.replace(owner=jnp.where((self.owner >= 0) & rows[self.owner], -1, self.owner))

    def in_use(self) -> jax.Array:
        """How many pages have an owner."""
        return jnp.sum(self.owner >= 0, dtype=jnp.int32)


@struct.dataclass
class PagedMask:
    """A call's mask over a pool: positions, place int [b, l] (the page of each position), owner, start [pages], the window."""

    positions: jax.Array
    place: jax.Array
    owner: jax.Array
    start: jax.Array
    window: int = struct.field(pytree_node=False)

    def write(self, pools: tuple[jax.Array, ...], new: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """A layer's pools [pages, g, page, ...] with new entries [b, g, l, ...] in the slots of the positions."""
        slot = (self.place, slice(None), self.positions % pools[0].shape[2])  # indexes as [b, l, g, k]
        return tuple(
            old.at[slot].set(x.transpose(0, 2, 1, 3).astype(old.dtype), mode="drop") for old, x in zip(pools, new, strict=True)
        )

    def seen(self, page: int) -> jax.Array:
        """bool [pages, l, page]: which slots of a page the queries of its owner see."""
        ahead = self.positions[self.owner][:, :, None] - (self.start[:, None] + jnp.arange(page)[None, :])[:, None, :]
        here = (ahead >= 0) & (self.owner >= 0)[:, None, None]
        return here & (ahead < self.window) if self.window else here

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float | None = None, bias: jax.Array | None = None,
        softcap: float | None = None,
    ) -> jax.Array:  # fmt: skip
        """`attention.attend` over the pool: q [b, l, h, k]; k, v [pages, g, page, k or w] -> [b, l, h, w].

        Each page meets its owner's queries; maxima, sums and products of a row's pages are then joined, all in float32.
        ValueError with a bias: relative positions have no pages.
        """
        if bias is not None:
            raise ValueError("a paged cache takes no attention bias")
        b, length, h, dim = q.shape
        pages, g, page = k.shape[:3]
        q = (q * (dim**-0.5 if scale is None else scale)).reshape(b, length, g, h // g, dim)
        q = q.transpose(0, 2, 3, 1, 4).reshape(b, g, -1, dim)
        scores = jnp.einsum("pglk,pgsk->pgls", q[self.owner], k, preferred_element_type=jnp.float32)
        scores = scores.reshape(pages, h, length, page)
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        seen = self.seen(page)[:, None]
        rows = jnp.where(self.owner < 0, b, self.owner)
        scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
        top = jax.ops.segment_max(scores.max(axis=-1), rows, b + 1)
        weights = jnp.where(seen, jnp.exp(scores - top[rows][..., None]), 0.0)
        total = jax.ops.segment_sum(weights.sum(axis=-1), rows, b + 1)[:b]
        weights = weights.astype(v.dtype).reshape(pages, g, -1, page)
        out = jnp.einsum("pgls,pgsk->pglk", weights, v, preferred_element_type=jnp.float32)
        out = jax.ops.segment_sum(out.reshape(pages, h, length, -1), rows, b + 1)[:b]
        # a row without pages has no weights, and its output is never read
        out = out / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
        return out.astype(v.dtype).transpose(0, 2, 1, 3)


def empty(model: Model, *, slots: int, pages: int, page: int, dtype: Any = None) -> PagedCache:
    """A pool of `pages` pages of `page` positions each for `slots` rows, all free.

    UserError: a size below 1, or a model whose cache is no keys and values of positions.
    """
    for name, value in (("slots", slots), ("pages", pages), ("page", page)):
        if value < 1:
            raise UserError(f"{name}={value}: must be at least 1")
    kept = None if model.encode is not None else jax.eval_shape(lambda: model.init_cache(1, page, dtype))
    if not isinstance(kept, KVCache):
        family = type(model.config).__name__.removesuffix("Config")
        raise UserError(f"{family} has no keys and values in pages: only decoders do, use decode.generate")
    pool = jax.tree.map(lambda x: jnp.zeros((pages, *x.shape[1:]), x.dtype), kept.layers)
    return PagedCache(pool, jnp.full(pages, -1, jnp.int32), jnp.zeros(pages, jnp.int32), jnp.zeros(slots, jnp.int32))
