"""From logits to a token: temperature, top-k and top-p as one transformation of the distribution."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def warp(logits: jax.Array, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> jax.Array:
    """The logits of the sampling distribution: [b, v] -> [b, v], float32, -inf where a token cannot be drawn.

    temperature 0 is greedy: only the most likely token remains (the first of equals). top_k keeps the k most likely, 0 keeps
    all; top_p keeps the smallest set of most likely tokens whose probability reaches p (nucleus, arXiv 1904.09751), always
    at least one. Temperature comes first, then top-k, then top-p: the order transformers uses.
    """
    logits = logits.astype(jnp.float32)
    v = logits.shape[-1]
    if temperature == 0:
        best = jnp.argmax(logits, axis=-1)[:, None] == jnp.arange(v)[None, :]
        return jnp.where(best, 0.0, -jnp.inf)
    logits = logits / temperature
    if 0 < top_k < v:
        kth = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if top_p < 1.0:
        order = jnp.argsort(-logits, axis=-1)
        probs = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
        keep = jnp.cumsum(probs, axis=-1) - probs < top_p  # what comes before it is still short of p
        keep = jnp.take_along_axis(keep, jnp.argsort(order, axis=-1), axis=-1)
        keep = keep | (logits == logits.max(axis=-1, keepdims=True))
        logits = jnp.where(keep, logits, -jnp.inf)
    return logits


def draw(keys: jax.Array, logits: jax.Array) -> jax.Array:
    """One token per row from its own key: keys [b], logits [b, v] -> int32 [b]. Rows do not affect each other.

    The draws of jax.random.categorical: the largest of logits and Gumbel noise.
    """
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], logits.dtype))(keys)
    return first_largest(logits + noise)


def first_largest(x: jax.Array) -> jax.Array:
    """The argmax of [b, v], int32 [b]. On a CPU XLA walks jnp.argmax (and makes its input) element by element: 4 to 6 times
    the time of two plain reductions."""
    index = jnp.where(x == x.max(axis=-1, keepdims=True), jnp.arange(x.shape[-1], dtype=jnp.int32)[None, :], x.shape[-1])
    return jnp.minimum(index.min(axis=-1), x.shape[-1] - 1).astype(jnp.int32)  # of nan alone: the last


def choose(keys: jax.Array, logits: jax.Array, *, temperature: float, top_k: int, top_p: float):
    """(token, its log-probability under the sampling distribution, and under the model), each [b], from logits [b, v].

    At temperature 0 the token is the argmax, its sampling log-probability is 0, and no key is used.
    """
    if temperature == 0:
        token = first_largest(logits)
        return token, jnp.zeros(token.shape), _logp(logits, token)
    warped = warp(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    token = draw(keys, warped)
    return token, _logp(warped, token), _logp(logits, token)


def warp_rows(logits: jax.Array, *, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """`warp` of [b, v] with settings that are arrays [b]: one program for all of them. Every temperature must be above 0."""
    logits = logits.astype(jnp.float32) / temperature[:, None]
    v = logits.shape[-1]

    def cut(logits: jax.Array) -> jax.Array:
        order = jnp.argsort(-logits, axis=-1)
        last = jnp.clip(jnp.where(top_k > 0, top_k, v), 1, v) - 1
        kth = jnp.take_along_axis(logits, jnp.take_along_axis(order, last[:, None], axis=-1), axis=-1)
        logits = jnp.where(logits < kth, -jnp.inf, logits)
        probs = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
        keep = (jnp.cumsum(probs, axis=-1) - probs < top_p[:, None]) | (top_p >= 1)[:, None]
        keep = jnp.take_along_axis(keep, jnp.argsort(order, axis=-1), axis=-1)
        keep = keep | (logits == logits.max(axis=-1, keepdims=True))
        return jnp.where(keep, logits, -jnp.inf)

    return jax.lax.cond(jnp.any((top_k > 0) | (top_p < 1)), cut, lambda x: x, logits)  # sorting costs more than all else


def choose_rows(
    keys: jax.Array, logits: jax.Array, *, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(token, its log-probability under the model), each [b], as `choose` with settings that are arrays [b]."""
    greedy = temperature == 0
    warped = warp_rows(logits, temperature=jnp.where(greedy, 1.0, temperature), top_k=top_k, top_p=top_p)
    token = jnp.where(greedy, first_largest(logits), draw(keys, warped))
    return token, _logp(logits, token)


def _logp(logits: jax.Array, token: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
