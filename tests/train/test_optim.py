"""Schedules at their corners, the decay mask, and AdamW against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm.train import optim


def cosine(lr, steps, warmup, final, t):
    if t < warmup:
        return lr * t / warmup
    share = min(1.0, (t - warmup) / (steps - warmup))
    return lr * (final + (1 - final) * 0.5 * (1 + np.cos(np.pi * share)))


@pytest.mark.parametrize("steps,warmup,final", [(100, 10, 0.1), (100, 0, 0.0), (7, 3, 1.0), (1, 0, 0.1)])
def test_warmup_cosine_equals_numpy(steps, warmup, final):
    schedule = optim.warmup_cosine(3e-4, steps, warmup=warmup, final=final)
    for t in sorted({0, 1, warmup, (steps + warmup) // 2, steps - 1, steps, steps + 50}):
        assert float(schedule(t)) == pytest.approx(cosine(3e-4, steps, warmup, final, t), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("warmup", [0, 4])
def test_warmup_linear_equals_numpy(warmup):
    schedule = optim.warmup_linear(1.0, 20, warmup=warmup, final=0.2)
    for t in (0, 2, warmup, 12, 20, 99):
        down = 1 - 0.8 * min(1.0, max(0, t - warmup) / (20 - warmup))
        assert float(schedule(t)) == pytest.approx(t / warmup if t < warmup else down, abs=1e-6)


def test_a_warmup_longer_than_the_run_is_cut():
    schedule = optim.warmup_cosine(1.0, 5, warmup=100)
    values = [float(schedule(t)) for t in range(6)]
    assert max(values) == pytest.approx(1.0) and values[5] == pytest.approx(0.1, abs=1e-6)


PARAMS = {
    "embed": {"tokens": jnp.ones((3, 2))},
    "norm": {"scale": jnp.ones(2), "bias": jnp.ones(2)},
    "q": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
}


def test_decay_applies_to_kernels_and_embeddings_only():
    assert optim.decayed(PARAMS) == {
        "embed": {"tokens": True},
        "norm": {"scale": False, "bias": False},
        "q": {"kernel": True, "bias": False},
    }
    zero = {k: {n: jnp.zeros_like(x) for n, x in v.items()} for k, v in PARAMS.items()}
    tx = optim.adamw(0.1, weight_decay=0.5)
    updates, _ = jax.jit(tx.update)(zero, jax.jit(tx.init)(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["q"]["kernel"], -0.05, rtol=1e-6)
    assert not np.asarray(updates["q"]["bias"]).any() and not np.asarray(updates["norm"]["scale"]).any()


def test_adamw_with_clipping_equals_numpy_over_three_steps():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 3))
    params = {"a": {"kernel": jnp.asarray(x, jnp.float32)}}
    tx = optim.adamw(0.01, b1=0.9, b2=0.95, weight_decay=0.1, clip_norm=1.0)
    state, m, v = jax.jit(tx.init)(params), 0.0, 0.0
    update = jax.jit(tx.update)
    for t in range(1, 4):
        g = rng.normal(size=(4, 3)) * (5 if t != 2 else 0.01)  # clipped, not clipped, clipped
        updates, state = update({"a": {"kernel": jnp.asarray(g, jnp.float32)}}, state, params)
        params = optax.apply_updates(params, updates)
        g = g * min(1.0, 1.0 / np.sqrt((g**2).sum()))
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        x = x - 0.01 * ((m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8) + 0.1 * x)
        np.testing.assert_allclose(params["a"]["kernel"], x, rtol=1e-4, atol=1e-6)
