"""Vocabulary operations against numpy, and their gradients against the naive ones."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core import ops
from jaxllm.core.types import Head
from jaxllm.generate import sampling

B, L, D, V, PADDED = 3, 7, 6, 11, 16
RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(B, L, D)).astype(np.float32)
KERNEL = RNG.normal(size=(D, PADDED)).astype(np.float32)
BIAS = RNG.normal(size=PADDED).astype(np.float32)
TARGETS = RNG.integers(0, V, (B, L)).astype(np.int32)
WEIGHTS = (RNG.random((B, L)) < 0.6) * RNG.choice([0.5, 1.0, 2.0], (B, L)).astype(np.float32)


def head(bias=True, softcap=None):
    return Head(jnp.asarray(KERNEL), jnp.asarray(BIAS) if bias else None, softcap, V)


def numpy_logits(bias=True, softcap=None, temperature=1.0):
    out = HIDDEN.astype(np.float64) @ KERNEL[:, :V] + (BIAS[:V] if bias else 0)
    return (softcap * np.tanh(out / softcap) if softcap else out) / temperature


def numpy_lse(out):
    top = out.max(-1)
    return top + np.log(np.exp(out - top[..., None]).sum(-1))


@pytest.mark.parametrize("bias,softcap", [(False, None), (True, 2.0)])
def test_logits_have_exactly_vocab_size_columns(bias, softcap):
    out = ops.logits(head(bias, softcap), jnp.asarray(HIDDEN))
    assert out.shape == (B, L, V) and out.dtype == jnp.float32
    np.testing.assert_allclose(out, numpy_logits(bias, softcap), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [None, 6])
def test_a_transform_renormalises_what_it_keeps(chunk):
    """Top-p from another folder as the transform: the sampler's own log-probabilities, token for token."""
    warp = partial(sampling.warp, top_p=0.7)
    got = ops.token_logp(head(), jnp.asarray(HIDDEN), jnp.asarray(TARGETS), chunk, 0.8, warp)
    warped = warp(jnp.asarray(numpy_logits(temperature=0.8).reshape(-1, V)))
    logp = np.array(jax.nn.log_softmax(warped)).reshape(B, L, V)
    expected = np.take_along_axis(logp, TARGETS[..., None], -1)[..., 0]
    kept = np.isfinite(expected)
    assert kept.any() and not kept.all()
    np.testing.assert_allclose(np.array(got.logp)[kept], expected[kept], rtol=1e-4, atol=1e-5)
    assert (np.array(got.logp)[~kept] < -1e29).all()
    entropy = -(np.exp(logp) * np.where(np.isfinite(logp), logp, 0)).sum(-1)
    np.testing.assert_allclose(got.entropy, entropy, rtol=1e-4, atol=1e-5)
    grad = jax.grad(
        lambda h: jnp.where(kept, ops.token_logp(head(), h, jnp.asarray(TARGETS), chunk, 0.8, warp).logp, 0.0).sum()
    )(jnp.asarray(HIDDEN))
    assert np.isfinite(np.array(grad)).all() and np.abs(np.array(grad)).max() > 0


@pytest.mark.parametrize(
    "chunk,bias,softcap,temperature",
    [
        (None, False, None, 1.0),
        (6, True, None, 0.7),
        (9, False, 3.0, 1.0),
        (1, True, 3.0, 1.9),
        (10**9, True, None, 1.0),
    ],
)
def test_token_logp_entropy_and_lse_equal_numpy(chunk, bias, softcap, temperature):
    got = ops.token_logp(head(bias, softcap), jnp.asarray(HIDDEN), jnp.asarray(TARGETS), chunk, temperature)
    out = numpy_logits(bias, softcap, temperature)
    lse = numpy_lse(out)
    logp = out - lse[..., None]
    expected = np.take_along_axis(logp, TARGETS[..., None], -1)[..., 0]
    np.testing.assert_allclose(got.logp, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.lse, lse, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.entropy, -(np.exp(logp) * logp).sum(-1), rtol=1e-5, atol=1e-5)


def naive(head, hidden, targets):
    logps = jax.nn.log_softmax(ops.logits(head, hidden), axis=-1)
    return jnp.take_along_axis(logps, targets[..., None], axis=-1)[..., 0]


def assert_same_gradients(one, two, **tolerance):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), **tolerance)


@pytest.mark.parametrize("chunk", [None, 6])
def test_token_logp_gradient_equals_the_naive_one(chunk):
    weights = jnp.asarray(WEIGHTS)

    def gradient(fn):
        grad = jax.jit(jax.grad(lambda h, x: jnp.sum(weights * fn(h, x)), argnums=(0, 1)))
        return grad(head(True, 3.0), jnp.asarray(HIDDEN))

    chunked = gradient(lambda h, x: ops.token_logp(h, x, jnp.asarray(TARGETS), chunk).logp)
    plain = gradient(lambda h, x: naive(h, x, jnp.asarray(TARGETS)))
    assert_same_gradients(chunked, plain, rtol=1e-4, atol=1e-5)
    assert np.abs(plain[0].kernel).max() > 0.1 and not np.asarray(chunked[0].kernel)[:, V:].any()


@pytest.mark.parametrize("chunk,softcap", [(None, None), (6, None), (3, 3.0)])
def test_cross_entropy_value_and_gradient_equal_the_naive_ones(chunk, softcap):
    weights, targets = jnp.asarray(WEIGHTS), jnp.asarray(TARGETS)
    args = (head(True, softcap), jnp.asarray(HIDDEN))

    # scaled by 3, so that a backward pass that ignores the cotangent fails
    def fused(h, x):
        return 3 * ops.cross_entropy(h, x, targets, weights, chunk)[0]

    def plain(h, x):
        return -3 * jnp.sum(weights * naive(h, x, targets))

    (value, grads), (expected, expected_grads) = (jax.jit(jax.value_and_grad(fn, argnums=(0, 1)))(*args) for fn in (fused, plain))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert_same_gradients(grads, expected_grads, rtol=1e-4, atol=1e-5)


def test_cross_entropy_counts_the_weighted_hits():
    best = numpy_logits().argmax(-1)
    targets = np.where(np.arange(L)[None, :] % 2, best, TARGETS).astype(np.int32)
    correct = ops.cross_entropy(head(), jnp.asarray(HIDDEN), jnp.asarray(targets), jnp.asarray(WEIGHTS), 6)[1]
    np.testing.assert_allclose(correct, (WEIGHTS * (best == targets)).sum(), rtol=1e-6)
    assert 0 < correct < WEIGHTS.sum()


def test_cross_entropy_in_bfloat16_is_close_and_keeps_the_dtypes():
    hidden = jnp.asarray(HIDDEN, jnp.bfloat16)
    weights, targets = jnp.asarray(WEIGHTS), jnp.asarray(TARGETS)
    value, (d_head, d_hidden) = jax.value_and_grad(lambda h, x: ops.cross_entropy(h, x, targets, weights, 6)[0], argnums=(0, 1))(
        head(), hidden
    )
    assert value.dtype == jnp.float32 and d_hidden.dtype == jnp.bfloat16
    assert d_head.kernel.dtype == jnp.float32
    expected = -(WEIGHTS * np.asarray(naive(head(), jnp.asarray(HIDDEN), targets))).sum()
    np.testing.assert_allclose(value, expected, rtol=0.02)


def test_a_token_without_weight_reaches_neither_value_nor_gradient():
    broken = jnp.asarray(HIDDEN).at[0, 0].set(50.0)
    weights = jnp.asarray(WEIGHTS).at[0, 0].set(0.0)
    grad = jax.value_and_grad(lambda h, x: ops.cross_entropy(h, x, jnp.asarray(TARGETS), weights, 6)[0])
    results = [grad(head(), x) for x in (jnp.asarray(HIDDEN), broken)]
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-6)
    assert_same_gradients(results[0][1], results[1][1], rtol=1e-5, atol=1e-6)
