"""Operations on the vocabulary: logits for sampling, and log-probabilities that never hold tokens x vocabulary."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from jaxllm.core.sharding import activation_axes, axis_size, current_rules, shard
from jaxllm.core.spec import mesh_axes
from jaxllm.core.types import Head, Model, Output, Params

CHUNK_ELEMENTS = 2**23  # logits held at once on one device when `chunk` is not given (32 MiB of float32),
CHUNK_TOKENS = 256  # but never fewer tokens: the head's gradient [d, v] is read and written once a chunk
NEGATIVE = -1e30  # finite, so that a masked column never makes inf - inf


@struct.dataclass
class TokenLogp:
    """Per token [b, l], float32: log p(target), the entropy of the distribution in nats, and log-sum-exp of its logits."""

    logp: jax.Array
    entropy: jax.Array
    lse: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """einsum(equation, x, y) in float32 of arrays of one dtype, whose gradients are products in that dtype too.

    JAX's own would be of float32: twice or more the time where x and y are bfloat16.
    """
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _product_backward(equation: str, kept: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    _, pull = jax.vjp(functools.partial(jnp.einsum, equation), *kept)
    return pull(grad.astype(kept[0].dtype))


product.defvjp(lambda equation, x, y: (product(equation, x, y), (x, y)), _product_backward)


def logits(head: Head, hidden: jax.Array) -> jax.Array:
    """[..., d] -> [..., vocab_size] float32: exactly vocab_size columns. For sampling; losses use the chunked functions."""
    return _logits(head, hidden)[..., : head.vocab_size]


def _logits(head: Head, hidden: jax.Array) -> jax.Array:
    """[..., d] -> [..., v] float32, the padded columns at NEGATIVE."""
    out = product("...d,dv->...v", hidden, head.kernel.astype(hidden.dtype))
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


# Over several devices each walks its chunks with a copy of the head of its own, [groups, parts, d, v], and adds up its own
# gradient of it: the head comes together once before the walk and its gradient is reduced once after it, not in every chunk.


def _groups(b: int, length: int) -> tuple[int, int]:
    """Over how many devices the rows and the length are split."""
    s = axis_size("batch")
    return (s if b % s == 0 else 1), _parts(length)


def _grouped(x: jax.Array, s: int) -> jax.Array:
    """A chunk [b, c, size, ...] as [s, c, b / s, size, ...]."""
    return jnp.moveaxis(x.reshape(s, -1, *x.shape[1:]), 1, 2)


def _ungrouped(x: jax.Array) -> jax.Array:
    """The inverse of `_grouped`."""
    x = jnp.moveaxis(x, 2, 1)
    return x.reshape(-1, *x.shape[2:])


def _copied(head: Head, s: int, c: int, dtype: Any) -> Head:
    """The head in the dtype that it is used in, once for every group."""
    spread = lambda x: jnp.broadcast_to(x[None, None], (s, c, *x.shape))  # noqa: E731
    bias = None if head.bias is None else spread(head.bias)
    return _apart(dataclasses.replace(head, kernel=spread(head.kernel.astype(dtype)), bias=bias))


def _apart(copies: Head) -> Head:
    """Arrays [s, c, ...] of a head kept where their groups are: a sum over groups must not move into the walk."""
    bias = None if copies.bias is None else shard(copies.bias, "batch", "length", "vocab")
    return dataclasses.replace(copies, kernel=shard(copies.kernel, "batch", "length", None, "vocab"), bias=bias)


def _reduced(d_head: Head, head: Head, dtype: Any) -> Head:
    """The sum of the groups' gradients. The kernel's travels in the dtype that its products have, to where its part of it lies
    first and is added up there, in float32: half the bytes of an all-reduce."""
    kernel = d_head.kernel.astype(dtype)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        place = activation_axes(("embed", "vocab"), head.kernel.shape, mesh)
        taken = [*(place[0] or ())] + [n for n, size in mesh.shape.items() if size == 1]
        names = [mesh_axes(name, current_rules()) for name in ("batch", "length")]
        rows = [tuple(n for n in some if n not in taken) or None for some in names]
        kernel = jax.lax.with_sharding_constraint(kernel, PartitionSpec(*rows, *place))
    bias = None if head.bias is None or d_head.bias is None else d_head.bias.sum((0, 1)).astype(head.bias.dtype)
    kernel = shard(kernel.astype(jnp.float32).sum((0, 1)), "embed", "vocab")
    return dataclasses.replace(head, kernel=kernel.astype(head.kernel.dtype), bias=bias)


def _chunk_length(hidden: jax.Array, head: Head, chunk: int | None) -> int:
    """Positions of a row, on each of the devices that its length is split over, in a chunk: from `chunk` tokens or the budget."""
    b, length = hidden.shape[:2]
    c = _parts(length)
    if chunk is None:
        chunk = axis_size("batch") * c * max(CHUNK_TOKENS, CHUNK_ELEMENTS // head.kernel.shape[1])
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

    def one(head: Head, hidden: jax.Array, targets: jax.Array, temperature: jax.Array) -> TokenLogp:
        out = _logits(head, hidden) / temperature
        if transform is not None:
            kept = transform(out.reshape(-1, out.shape[-1])).reshape(out.shape)
            out = jnp.where(kept == -jnp.inf, NEGATIVE, kept)
        lse = jax.nn.logsumexp(out, axis=-1)
        entropy = lse - jnp.sum(jnp.exp(out - lse[..., None]) * out, axis=-1)
        return TokenLogp(_pick(out, targets) - lse, entropy, lse)

    temperature = jnp.asarray(temperature, jnp.float32)
    s, c = _groups(*targets.shape)
    if size * c == hidden.shape[1]:
        return jax.checkpoint(one)(head, hidden, targets, temperature)
    if s * c > 1:
        return _walked(one, size, head, hidden, targets, temperature)
    parts = jax.lax.map(lambda xs: jax.checkpoint(one)(head, *xs, temperature), (_split(hidden, size), _split(targets, size)))
    return jax.tree.map(lambda x: _join(x, hidden.shape[1]), parts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _walked(one: Callable, size: int, head: Head, hidden: jax.Array, targets: jax.Array, temperature: jax.Array) -> TokenLogp:
    """one(head, hidden, targets, temperature) chunk by chunk, on several devices."""
    s, c = _groups(*targets.shape)
    copies, each = _copied(head, s, c, hidden.dtype), jax.vmap(jax.vmap(one, (0, 0, 0, None)), (0, 0, 0, None))

    def chunk(xs: Any) -> TokenLogp:
        return jax.tree.map(_ungrouped, each(copies, *(_grouped(x, s) for x in xs), temperature))

    parts = jax.lax.map(chunk, (_split(hidden, size), _split(targets, size)))
    return jax.tree.map(lambda x: _join(x, hidden.shape[1]), parts)


def _walked_forward(one: Callable, size: int, head: Head, hidden: jax.Array, targets: jax.Array, temperature: jax.Array):
    return _walked(one, size, head, hidden, targets, temperature), (head, hidden, targets, temperature)


def _walked_backward(one: Callable, size: int, kept: Any, cotangents: TokenLogp):
    head, hidden, targets, temperature = kept
    s, c = _groups(*targets.shape)
    copies, each = _copied(head, s, c, hidden.dtype), jax.vmap(jax.vmap(one, (0, 0, 0, None)), (0, 0, 0, None))

    def body(carry: Any, xs: Any):
        hidden, targets, given = jax.tree.map(lambda x: _grouped(x, s), xs)
        _, pull = jax.vjp(lambda k, h, t: each(k, h, targets, t), copies, hidden, temperature)
        d_head, d_hidden, d_temperature = pull(given)
        d_head, d_temperature = jax.tree.map(jnp.add, carry, (d_head, d_temperature))
        return (_apart(d_head), d_temperature), _ungrouped(d_hidden)

    zero = (jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), copies), jnp.zeros_like(temperature))
    xs = (_split(hidden, size), _split(targets, size), jax.tree.map(lambda x: _split(x, size), cotangents))
    (d_head, d_temperature), d_hidden = jax.lax.scan(body, zero, xs)
    return _reduced(d_head, head, hidden.dtype), _join(d_hidden, hidden.shape[1]), None, d_temperature


_walked.defvjp(_walked_forward, _walked_backward)


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

    xs = tuple(_split(x, size) for x in (hidden, targets, weights))
    s, c = _groups(*targets.shape)
    if s * c > 1:
        return _cross_entropy_walked(grad, s, c, head, hidden, xs)

    def body(carry, xs):
        values, (d_head, d_hidden) = grad(head, *xs)
        return jax.tree.map(jnp.add, carry, (values, d_head)), d_hidden

    zero = ((jnp.float32(0), jnp.float32(0)), jax.tree.map(jnp.zeros_like, head))
    (values, d_head), d_hidden = jax.lax.scan(body, zero, xs)
    return values, (d_head, _join(d_hidden, hidden.shape[1]))


def _cross_entropy_walked(grad: Callable, s: int, c: int, head: Head, hidden: jax.Array, xs: tuple[jax.Array, ...]):
    """The forward pass on several devices."""
    copies, each = _copied(head, s, c, hidden.dtype), jax.vmap(jax.vmap(grad))

    def body(carry, xs):
        values, (d_head, d_hidden) = each(copies, *(_grouped(x, s) for x in xs))
        values, d_head = jax.tree.map(jnp.add, carry, (values, d_head))
        return (values, _apart(d_head)), _ungrouped(d_hidden)

    zero = ((jnp.zeros((s, c)), jnp.zeros((s, c))), jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), copies))
    (values, d_head), d_hidden = jax.lax.scan(body, zero, xs)
    values = jax.tree.map(jnp.sum, values)
    return values, (_reduced(d_head, head, hidden.dtype), _join(d_hidden, hidden.shape[1]))


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
