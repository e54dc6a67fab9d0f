"""Norms, rotary positions and attention, re-derived in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models import attention, layers

RNG = np.random.default_rng(0)


def test_rmsnorm_and_layernorm_equal_numpy():
    x = RNG.normal(2, 3, (2, 3, 5)).astype(np.float32)
    scale, bias = RNG.normal(size=(2, 5)).astype(np.float32)
    got = layers.norm({"scale": jnp.asarray(scale)}, jnp.asarray(x), 1e-3)
    np.testing.assert_allclose(got, x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * scale, rtol=1e-5)
    got = layers.norm({"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}, jnp.asarray(x), 1e-3)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3) * scale + bias
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_norms_compute_in_float32_and_keep_the_dtype():
    x = jnp.full((1, 1, 4), 300.0, jnp.float16)  # 300^2 overflows float16
    got = layers.norm({"scale": jnp.ones(4)}, x, 1e-5)
    assert got.dtype == jnp.float16
    np.testing.assert_allclose(got, np.ones((1, 1, 4)), rtol=1e-3)


def test_rope_rotates_pairs_of_halves():
    x = RNG.normal(size=(2, 3, 1, 8)).astype(np.float32)
    positions = np.array([[0, 1, 7], [3, 3, 100]])
    got = np.asarray(layers.rope(jnp.asarray(x), jnp.asarray(positions), layers.frequencies(x.shape[-1], 50.0)))
    turn = np.exp(1j * positions[..., None] * 50.0 ** (-2 * np.arange(4) / 8))[:, :, None]
    z = (x[..., :4] + 1j * x[..., 4:]) * turn
    np.testing.assert_allclose(got, np.concatenate([z.real, z.imag], -1), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(got[0, 0], x[0, 0])  # position 0 does not turn


def test_rope_products_depend_on_the_distance_only():
    q, k = jnp.asarray(RNG.normal(size=(2, 1, 1, 1, 8)).astype(np.float32))

    def product(m, n):
        at = (layers.rope(x, jnp.array([[p]]), layers.frequencies(x.shape[-1], 10_000.0)) for x, p in ((q, m), (k, n)))
        return float(jnp.sum(next(at) * next(at)))

    assert product(5, 2) == pytest.approx(product(105, 102), abs=1e-4)
    assert abs(product(5, 2) - product(5, 3)) > 1e-3


def test_segment_positions_restart_with_every_segment():
    segments = jnp.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 3, 3, 3, 3, 0]])
    got = layers.segment_positions(segments)
    np.testing.assert_array_equal(got, [[0, 1, 2, 0, 1, 0, 1], [0, 0, 0, 1, 2, 3, 0]])


@pytest.mark.parametrize(
    ("equation", "x", "kernel"),
    [("bld,dhk->blhk", (2, 3, 8), (8, 4, 5)), ("blhk,hkd->bld", (2, 3, 4, 5), (4, 5, 6)), ("blf,fd->bld", (2, 3, 9), (9, 2)),
     ("bd,de->be", (7, 3), (3, 4))],
)  # fmt: skip
def test_the_gradients_of_a_product_are_those_that_jax_derives(equation, x, kernel):
    x, kernel = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in (x, kernel))
    out, back = jax.vjp(lambda x, w: layers.dense(x, equation, w), x, kernel)
    same, expected = jax.vjp(lambda x, w: jnp.einsum(equation, x, w), x, kernel)
    grad = jnp.asarray(RNG.normal(size=out.shape), jnp.float32)
    for got, want in zip((out, *back(grad)), (same, *expected(grad)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_gelu_and_its_gradient_are_those_of_jax():
    x = jnp.concatenate([jnp.linspace(-6, 6, 101), jnp.array([-1e4, 0.0, 1e4])])
    grads = [jax.vmap(jax.grad(f))(x) for f in (layers.gelu, lambda x: jax.nn.gelu(x, approximate=True))]
    np.testing.assert_allclose(layers.gelu(x), jax.nn.gelu(x, approximate=True), atol=1e-6)
    np.testing.assert_allclose(*grads, atol=2e-5)  # JAX's own is off by 1e-5 where tanh is almost 1


def naive_attention(q, k, v, mask):
    """Loops over rows, heads and positions."""
    b, length, h, dim = q.shape
    group = h // k.shape[2]
    out = np.zeros_like(q)
    for i in range(b):
        for j in range(h):
            for t in range(length):
                seen = np.flatnonzero(mask[i, t])
                scores = np.array([q[i, t, j] @ k[i, s, j // group] for s in seen]) / np.sqrt(dim)
                p = np.exp(scores - scores.max())
                out[i, t, j] = sum(w * v[i, s, j // group] for w, s in zip(p / p.sum(), seen, strict=True))
    return out


@pytest.mark.parametrize("heads,kv_heads", [(4, 4), (4, 2), (4, 1), (1, 1)])
def test_attention_equals_a_naive_loop(heads, kv_heads):
    q = RNG.normal(size=(2, 6, heads, 8)).astype(np.float32)
    k, v = RNG.normal(size=(2, 2, 6, kv_heads, 8)).astype(np.float32)
    mask = np.asarray(attention.causal_mask(jnp.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])))
    got = attention.attend(*map(jnp.asarray, (q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), mask)))
    np.testing.assert_allclose(got, naive_attention(q, k, v, mask), rtol=1e-4, atol=1e-5)


def test_the_causal_mask_keeps_segments_apart():
    got = np.asarray(attention.causal_mask(jnp.array([[1, 1, 2, 2]])))[0].astype(int)
    np.testing.assert_array_equal(got, [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]])
