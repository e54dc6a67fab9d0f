"""Many feed-forward networks, each on its own rows: the grouped products of a mixture of experts on one device.

A slot is one (token, chosen expert) pair: slots [t * k] are in the order of tokens and hold an expert's number, or n where
nothing is to be computed (padding). A layout places slots in rows so that an expert's rows lie together; buffers have the
size of slots x d, never tokens x experts x d.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.models.ffn import KINDS
from jaxllm.models.layers import ACTIVATIONS

BLOCK = 512  # rows of one expert in a product of `blocks`, at most
Product = Callable[[jax.Array, jax.Array], jax.Array]  # (rows [rows, a], kernels [n, a, b]) -> [rows, b]


class Layout(NamedTuple):
    """source int [rows]: the slot in each row (slots: empty); place int [slots]: its row (rows: not computed)."""

    source: jax.Array
    place: jax.Array

    @property
    def kept(self) -> jax.Array:
        """bool [slots]: which slots are computed."""
        return self.place < self.source.shape[0]


def apply(params: Any, kind: str, x: jax.Array, slots: jax.Array, *, n: int, k: int, capacity: int | None = None):
    """x [t, d] through the experts of slots int [t * k] in 0..n (n: none) -> (y [t * k, d], kept bool [t * k]).

    With a capacity, the slots of an expert beyond its first `capacity` are dropped: their y is 0.
    """
    if capacity is not None:
        layout = capacity_layout(slots, n, capacity)
        product = functools.partial(batched, n)
    else:
        # XLA expands ragged_dot on a CPU to rows x experts x d
        layout, product = (blocks if jax.default_backend() == "cpu" else ragged)(slots, n)
    y = network(params, kind, take(x, layout, k), product)
    return put_back(y, layout), layout.kept


def network(params: Any, kind: str, rows: jax.Array, product: Product) -> jax.Array:
    """The feed-forward block of `ffn.apply` with a grouped product: rows [rows, d] -> [rows, d]."""
    act, gated = ACTIVATIONS[KINDS[kind][0]], KINDS[kind][1]
    up = product(rows, params["up"]["kernel"].astype(rows.dtype))
    hidden = act(product(rows, params["gate"]["kernel"].astype(rows.dtype))) * up if gated else act(up)
    return product(hidden, params["down"]["kernel"].astype(rows.dtype))


def batched(n: int, rows: jax.Array, kernels: jax.Array) -> jax.Array:
    """Every expert has equally many rows, one expert after another."""
    grouped = rows.reshape(n, rows.shape[0] // n, rows.shape[1])
    return jnp.einsum("ecd,edf->ecf", grouped, kernels).reshape(rows.shape[0], -1)


def ragged(slots: jax.Array, n: int) -> tuple[Layout, Product]:
    """Rows sorted by expert without gaps, for `jax.lax.ragged_dot` (the block-sparse products of arXiv 2211.15841)."""
    rank, sizes, starts = _ranks(slots, n)
    layout = _layout(jnp.where(slots < n, starts[slots] + rank, slots.shape[0]), slots.shape[0])
    real = (layout.source < slots.shape[0])[:, None]

    def product(rows: jax.Array, kernels: jax.Array) -> jax.Array:
        # beyond the groups ragged_dot promises nothing
        return jnp.where(real, jax.lax.ragged_dot(rows, kernels, sizes), 0)

    return layout, product


def blocks(slots: jax.Array, n: int, size: int | None = None) -> tuple[Layout, Product]:
    """Each expert's rows padded to whole blocks of `size`, and a batched product over blocks with their experts' kernels.

    By default padding adds at most a quarter to the rows, and a product holds the kernels of at most slots / BLOCK + 5 n blocks.
    """
    rank, sizes, _ = _ranks(slots, n)
    size = size or min(BLOCK, max(1, slots.shape[0] // (4 * n)))
    count = (slots.shape[0] + n * (size - 1)) // size  # whatever the sizes are
    ends = jnp.cumsum(-(-sizes // size))
    first = jnp.pad(ends, (1, 0)) * size
    layout = _layout(jnp.where(slots < n, first[slots] + rank, count * size), count * size)
    owner = jnp.minimum(jnp.searchsorted(ends, jnp.arange(count), side="right"), n - 1)

    @jax.checkpoint  # the kernels of blocks are gathered again, not kept for the backward pass
    def product(rows: jax.Array, kernels: jax.Array) -> jax.Array:
        return jnp.einsum("mcd,mdf->mcf", rows.reshape(count, size, -1), kernels[owner]).reshape(count * size, -1)

    return layout, product


def capacity_layout(groups: jax.Array, n: int, capacity: int) -> Layout:
    """`capacity` rows for each group, taken in the order of slots; later slots have none. Rows: n * capacity."""
    rank, _, _ = _ranks(groups, n)
    return _layout(jnp.where((groups < n) & (rank < capacity), groups * capacity + rank, n * capacity), n * capacity)


def _ranks(groups: jax.Array, n: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """([slots] how many slots of its group precede a slot, [n] the groups' sizes, [n + 1] where groups start when sorted)."""
    sizes = jnp.bincount(groups, length=n)
    starts = jnp.pad(jnp.cumsum(sizes), (1, 0))
    index = jnp.arange(groups.shape[0])
    order = jnp.argsort(groups, stable=True)
    return jnp.zeros_like(index).at[order].set(index, unique_indices=True) - starts[groups], sizes, starts


def _layout(place: jax.Array, rows: int) -> Layout:
    slots = place.shape[0]
    return Layout(jnp.full(rows, slots).at[place].set(jnp.arange(slots), mode="drop"), place)


def take(x: jax.Array, layout: Layout, k: int) -> jax.Array:
    """Tokens [t, d] to rows [rows, d], zeros where a row is empty."""
    return _gather(k, x, layout.source, layout.place)


def put_back(rows: jax.Array, layout: Layout) -> jax.Array:
    """Rows [rows, d] to slots [slots, d], zeros where a slot was not computed."""
    return _gather(1, rows, layout.place, layout.source)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(k: int, x: jax.Array, index: jax.Array, back: jax.Array) -> jax.Array:
    """x [n, d] -> x[index // k] [m, d]; back int [n * k]: where in index each of x's k copies stands (m: nowhere).

    Knowing both directions, the gradient is a gather too.
    """
    return x.at[index // k].get(mode="fill", fill_value=0)


def _gather_forward(k: int, x: jax.Array, index: jax.Array, back: jax.Array):
    return _gather(k, x, index, back), back


def _gather_backward(k: int, back: jax.Array, dy: jax.Array):
    dx = dy.at[back].get(mode="fill", fill_value=0)
    return dx.reshape(-1, k, dy.shape[1]).sum(axis=1), None, None


_gather.defvjp(_gather_forward, _gather_backward)
