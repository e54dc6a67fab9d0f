"""Operations on the vocabulary: logits for sampling, and log-probabilities that never hold tokens x vocabulary."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxllm.core.sharding import axis_size, shard
from jaxllm.core.types import Head, Model, Output, Params

CHUNK_ELEMENTS = 2**23  # logits held at once on one device when `chunk` is not given (32 MiB of float32)
NEGATIVE = -1e30  # finite, so that a masked column never makes inf - inf


@struct.dataclass
class TokenLogp:
    """Per token [b, l], float32: log p(target), the entropy of the distribution in nats, and log-sum-exp of its logits."""

    logp: jax.Array
    entropy: jax.Array
    lse: jax.Array


def logits(head: Head, hidden: jax.Array) -> jax.Array:
    """[..., d] -> [..., vocab_size] float32: exactly vocab_size columns. For sampling; losses use the chunked functions."""
    return _logits(head, hidden)[..., : head.vocab_size]


def _logits(head: Head, hidden: jax.Array) -> jax.Array:
    """[..., d] -> [..., v] float32, the padded columns at NEGATIVE."""
    out = jnp.einsum("...d,dv->...v", hidden, head.kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
    if head.bias is not None:
        out = out + head.bias.astype(jnp.float32).reshape((1,) * (out.ndim - 1) + (-1,))
    if head.softcap is not None:
        out = head.softcap * jnp.tanh(out / head.softcap)
    if head.vocab_size is not None and head.vocab_size < out.shape[-1]:
        real = jnp.arange(out.shape[-1]) < head.vocab_size
        out = jnp.where(real.reshape((1,) * (out.ndim - 1) + (-1,)), out, NEGATIVE)
    return out


def _pick(values: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, ids[..., None], axis=-1)[..., 0]


def _split(x: jax.Array, size: int) -> jax.Array:
    """[b, l, ...] -> [chunks, b, c, size, ...], the length padded with zeros; c: over how many devices the length is split.

    The batch axis stays whole and each device walks its own part of the length, so nothing travels.
    """
    b, length = x.shape[:2]
    c = _parts(length)
    n = -(-(length // c) // size)
    x = x.reshape(b, c, length // c, *x.shape[2:])
    x = jnp.pad(x, [(0, 0), (0, 0), (0, n * size - x.shape[2])] + [(0, 0)] * (x.ndim - 3))
    x = jnp.moveaxis(x.reshape(b, c, n, size, *x.shape[3:]), 2, 0)
    return shard(x, None, "batch", "length", *(None,) * (x.ndim - 3))


def _join(x: jax.Array, length: int) -> jax.Array:
    """The inverse of `_split`, cut to `length`."""
    c = _parts(length)
    x = jnp.moveaxis(x, 0, 2)
    x = x.reshape(x.shape[0], c, -1, *x.shape[4:])[:, :, : length // c]
    return x.reshape(x.shape[0], length, *x.shape[3:])


def _parts(length: int) -> int:
    c = axis_size("length")
    return c if length % c == 0 else 1


def _chunk_length(hidden: jax.Array, head: Head, chunk: int | None) -> int:
    """Positions of a row, on each of the devices that its length is split over, in a chunk: from `chunk` tokens or the budget."""
    b, length = hidden.shape[:2]
    c = _parts(length)
    if chunk is None:
        chunk = axis_size("batch") * c * max(1, CHUNK_ELEMENTS // head.kernel.shape[1])
    return min(length // c, max(1, chunk // (b * c)))


def token_logp(
    head: Head, hidden: jax.Array, targets: jax.Array, chunk: int | None = None, temperature: Any = 1.0,
    transform: Callable[[jax.Array], jax.Array] | None = None,
) -> TokenLogp:  # fmt: skip
    """Log-probability of each target under softmax(logits / temperature), walked in chunks of about `chunk` tokens.

    hidden [b, l, d], targets int [b, l] in [0, vocab_size) -> TokenLogp of [b, l]. A chunk's logits are recomputed in the
    backward pass, so neither pass holds a buffer of tokens x vocabulary. transform, a function of logits [tokens, v] such as
    the renormalisation of top-p, comes after the temperature; what it sets to -inf has probability 0 (in logs: -1e30).
    """
    size = _chunk_length(hidden, head, chunk)

    @jax.checkpoint
    def one(head: Head, hidden: jax.Array, targets: jax.Array) -> TokenLogp:
        out = _logits(head, hidden) / temperature
        if transform is not None:
            kept = transform(out.reshape(-1, out.shape[-1])).reshape(out.shape)
            out = jnp.where(kept == -jnp.inf, NEGATIVE, kept)
        lse = jax.nn.logsumexp(out, axis=-1)
        entropy = lse - jnp.sum(jnp.exp(out - lse[..., None]) * out, axis=-1)
        return TokenLogp(_pick(out, targets) - lse, entropy, lse)

    if size * _parts(hidden.shape[1]) == hidden.shape[1]:
        return one(head, hidden, targets)
    parts = jax.lax.map(lambda xs: one(head, *xs), (_split(hidden, size), _split(targets, size)))
    return jax.tree.map(lambda x: _join(x, hidden.shape[1]), parts)


def cross_entropy(
    head: Head, hidden: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Sum over tokens of -weights * log p(target), and the weighted number of targets that are the most likely token.

    hidden [b, l, d], targets [b, l], weights [b, l] (bool or float, not differentiated) -> two float32 scalars. The weights
    are known beforehand, so each chunk's gradient is formed in the forward pass and its logits are made only once
    (the fused linear cross-entropy of Liger Kernel, arXiv 2410.10989). The second result carries no gradient.
    """
    return _cross_entropy(_chunk_length(hidden, head, chunk), head, hidden, targets, weights.astype(jnp.float32))


def _chunk_loss(head: Head, hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    out = _logits(head, hidden)
    target = _pick(out, targets)
    correct = jnp.sum(weights * (target >= jax.lax.stop_gradient(out.max(axis=-1))))
    return jnp.sum(weights * (jax.nn.logsumexp(out, axis=-1) - target)), correct


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(size: int, head: Head, hidden: jax.Array, targets: jax.Array, weights: jax.Array):
    if size * _parts(hidden.shape[1]) == hidden.shape[1]:
        return _chunk_loss(head, hidden, targets, weights)

    def body(carry, xs):
        return jax.tree.map(jnp.add, carry, _chunk_loss(head, *xs)), None

    return jax.lax.scan(body, (jnp.float32(0), jnp.float32(0)), tuple(_split(x, size) for x in (hidden, targets, weights)))[0]


def _cross_entropy_forward(size: int, head: Head, hidden: jax.Array, targets: jax.Array, weights: jax.Array):
    grad = jax.value_and_grad(_chunk_loss, argnums=(0, 1), has_aux=True)
    if size * _parts(hidden.shape[1]) == hidden.shape[1]:
        values, grads = grad(head, hidden, targets, weights)
        return values, grads

    def body(carry, xs):
        values, (d_head, d_hidden) = grad(head, *xs)
        return jax.tree.map(jnp.add, carry, (values, d_head)), d_hidden

    zero = ((jnp.float32(0), jnp.float32(0)), jax.tree.map(jnp.zeros_like, head))
    xs = tuple(_split(x, size) for x in (hidden, targets, weights))
    (values, d_head), d_hidden = jax.lax.scan(body, zero, xs)
    return values, (d_head, _join(d_hidden, hidden.shape[1]))


def _cross_entropy_backward(size: int, grads: tuple[Head, jax.Array], cotangents: tuple[jax.Array, jax.Array]):
    scale = cotangents[0]
    d_head, d_hidden = jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads)
    return d_head, d_hidden, None, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def forward(model: Model, params: Params, record: Any, **options: Any) -> Output:
    """The model on a sequence record: tokens and segments [b, l], and `inputs`, where the model reads something else first."""
    if model.encode is not None:
        options["context"] = model.encode(params, record["inputs"])
    return model.apply(params, record["tokens"], segments=record["segments"], **options)


def model_logps(
    model: Model, params: Params, record: Any, chunk: int | None = None, temperature: Any = 1.0,
    transform: Callable[[jax.Array], jax.Array] | None = None,
) -> TokenLogp:  # fmt: skip
    """TokenLogp [b, l] of a sequence record (tokens, targets, segments) under a model; the caller applies the mask."""
    hidden = forward(model, params, record).hidden
    return token_logp(model.head(params), hidden, record["targets"], chunk, temperature, transform)
