"""Continuous batching: a queue of prompts through a few rows, whose places are taken by the next ones as they finish."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxllm.core import ops
from jaxllm.core.spec import unstack
from jaxllm.core.types import Key, Model, Params, UserError
from jaxllm.generate.decode import Drawn, Samples, nothing, place, prefill, repeat_rows
from jaxllm.generate.sampling import choose


@struct.dataclass
class Served:
    """samples of the whole queue in its order; int []: steps of all slots, row_steps (rows that were decoded, summed over
    steps), prefills, peak_pages in use at once."""

    samples: Samples
    steps: jax.Array
    row_steps: jax.Array
    prefills: jax.Array
    peak_pages: jax.Array


@struct.dataclass
class Held:
    """The prompt that was read last (its number, -1: none), its cache of one row, and hidden [1, d] at its last token."""

    prompt: jax.Array
    cache: Any
    hidden: jax.Array


@struct.dataclass
class Turn:
    """The loop's state: the pool; by slot the row that it serves (the number of rows: none) and the token to read next, both
    [slots]; what has been drawn; the first row of the queue that waits; the last prompt; counters."""

    cache: Any
    row: jax.Array
    token: jax.Array
    drawn: Drawn
    waiting: jax.Array
    held: Held
    steps: jax.Array
    row_steps: jax.Array
    prefills: jax.Array
    peak_pages: jax.Array


def serve(
    model: Model, params: Params, prompts: jax.Array, prompt_lengths: jax.Array, key: Key, cache: Any, *, max_new_tokens: int,
    stop: tuple[int, ...] = (), temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, group: int = 1,
    row_offset: int = 0, limits: jax.Array | None = None,
) -> Served:  # fmt: skip
    """`decode.generate` of any number of prompts int [n, p] in a pool of pages; jit it with the rest bound.

    cache: an empty pool (`models.paged.empty`), which says how many rows are decoded at once. A row is admitted when a slot
    and the pages for its prompt and its limit are free, and gives them back when it ends: no step is spent on rows that have
    stopped while others wait, and no row waits for pages that another one waits for. A prompt is read once, by itself, and
    its cache is copied to each of its `group` rows. limits int [n * group]: each row's own max_new_tokens, at most that.
    Keys are those of `decode.generate`, and so is every row's sample. UserError where the pool cannot hold the longest row.
    """
    n, p = prompts.shape[0] * group, prompts.shape[1]
    _check(cache, p, max_new_tokens)
    params, lengths = unstack(params), repeat_rows(prompt_lengths, group)
    limits = jnp.full(n, max_new_tokens) if limits is None else jnp.clip(limits, 1, max_new_tokens)
    room, dtype = -(-p // cache.page) * cache.page, cache.layers[0][0].dtype

    def draw(drawn: Drawn, rows: jax.Array, hidden: jax.Array) -> tuple[Drawn, jax.Array, jax.Array]:
        """The next token of each of the rows int [m] (n: none) from hidden [m, d]: (Drawn, tokens, which rows have ended)."""
        at = drawn.count[rows]
        keys = jax.vmap(lambda r, i: jax.random.fold_in(jax.random.fold_in(key, r), i))(rows + row_offset, lengths[rows] + at)
        logits = ops.logits(model.head(params), hidden)
        found = choose(keys, logits, temperature=temperature, top_k=top_k, top_p=top_p)
        hit = jnp.isin(found[0], jnp.asarray(stop, jnp.int32)) if stop else jnp.zeros(rows.shape, bool)
        return drawn.put(at, rows, found, hit), found[0], hit | (at + 1 >= limits[rows])

    def read(prompt: jax.Array) -> Held:
        return Held(prompt, *prefill(model, params, prompts[prompt][None], prompt_lengths[prompt][None], room, dtype))

    def step(t: Turn) -> Turn:
        t = _admit(t, draw, read, lengths + limits - 1, group)
        active = t.row < n
        out = model.apply(params, t.token[:, None], segments=active[:, None].astype(jnp.int32), cache=t.cache)
        drawn, token, ended = draw(t.drawn, t.row, out.hidden[:, 0])
        return t.replace(
            cache=out.cache.release(active & ended), row=jnp.where(ended, n, t.row), token=token, drawn=drawn,
            steps=t.steps + jnp.any(active), row_steps=t.row_steps + jnp.sum(active, dtype=jnp.int32),
        )  # fmt: skip

    start = _start(cache, nothing(max_new_tokens, n), jax.eval_shape(read, jnp.int32(0)))
    t = jax.lax.while_loop(lambda t: (t.waiting < n) | jnp.any(t.row < n), step, start)
    samples = place(repeat_rows(prompts, group), lengths, t.drawn)
    return Served(samples, t.steps, t.row_steps, t.prefills, t.peak_pages)


def _admit(t: Turn, draw: Callable, read: Callable, tokens: jax.Array, group: int) -> Turn:
    """Slots and pages for as many of those that wait as there is room for; tokens int [n]: the positions that a row needs."""
    n, slots = tokens.shape[0], t.row.shape[0]

    def fits(t: Turn) -> jax.Array:
        free = (t.cache.owner.shape[0] - t.cache.in_use()) * t.cache.page
        return (t.waiting < n) & jnp.any(t.row == n) & (-(-tokens[t.waiting] // t.cache.page) * t.cache.page <= free)

    def one(t: Turn) -> Turn:
        """The first that waits draws its first token, and takes a slot and pages unless that was its last."""
        row, prompt = t.waiting, t.waiting // group
        held = jax.lax.cond(t.held.prompt == prompt, lambda: t.held, lambda: read(prompt))
        drawn, token, ended = draw(t.drawn, row[None], held.hidden)
        slot = jnp.where(ended[0], slots, jnp.argmax(t.row == n))
        cache = t.cache.admit(slot, held.cache, jnp.where(ended[0], 0, tokens[row]))
        return t.replace(
            cache=cache, row=t.row.at[slot].set(row, mode="drop"), token=t.token.at[slot].set(token[0], mode="drop"),
            drawn=drawn, waiting=row + 1, held=held, prefills=t.prefills + (t.held.prompt != prompt),
            peak_pages=jnp.maximum(t.peak_pages, cache.in_use()),
        )  # fmt: skip

    return jax.lax.while_loop(fits, one, t)


def _start(cache: Any, drawn: Drawn, held: Any) -> Turn:
    """Every slot free, nothing drawn, and no prompt read; held: the shapes of a prompt that has been."""
    slots, n, zero = cache.length.shape[0], drawn.count.shape[0], jnp.int32(0)
    none = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), held).replace(prompt=jnp.int32(-1))
    return Turn(cache, jnp.full(slots, n), jnp.zeros(slots, jnp.int32), drawn, zero, none, zero, zero, zero, zero)


def _check(cache: Any, p: int, max_new_tokens: int) -> None:
    """UserError where the longest row does not fit into the pool."""
    longest = p + max_new_tokens - 1  # the last token is drawn and never read
    pages = cache.owner.shape[0]
    if pages * cache.page < longest:
        raise UserError(
            f"pages={pages} of {cache.page} positions cannot hold one row of {p} + {max_new_tokens} tokens: "
            f"use pages={-(-longest // cache.page)} or more"
        )
