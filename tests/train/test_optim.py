"""Schedules at their corners, the decay mask, and AdamW against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import pretrain
from experiments import common
from jaxllm.core.types import UserError
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


def test_adafactor_with_clipping_equals_numpy_over_three_steps():
    rng = np.random.default_rng(1)
    x, bias = rng.normal(size=(2, 4, 6)), rng.normal(size=3)  # two layers; 4 x 6 are factored
    params = {"a": {"kernel": jnp.asarray(x, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}}
    tx = optim.adafactor(0.01, smallest=4, weight_decay=0.1, clip_norm=1.0)
    state, row, col, v = jax.jit(tx.init)(params), 0.0, 0.0, 0.0
    shapes = {m.shape for m in jax.tree.leaves(state)}
    assert (2, 4) in shapes and (2, 6) in shapes and (2, 4, 6) not in shapes  # a row and a column in place of the matrix
    update = jax.jit(tx.update)
    for t in range(1, 4):
        g, h = rng.normal(size=(2, 4, 6)), rng.normal(size=3)
        given = {"a": {"kernel": jnp.asarray(g, jnp.float32), "bias": jnp.asarray(h, jnp.float32)}}
        updates, state = update(given, state, params)
        params = optax.apply_updates(params, updates)
        scale = min(1.0, 1.0 / np.sqrt((g**2).sum() + (h**2).sum()))
        g, h, keep = g * scale, h * scale, 1 - t**-0.8
        row, col = keep * row + (1 - keep) * (g**2).mean(axis=2), keep * col + (1 - keep) * (g**2).mean(axis=1)
        v = keep * v + (1 - keep) * h**2
        u = g / np.sqrt(row[:, :, None] * col[:, None, :] / row.mean(axis=1)[:, None, None])
        u, w = u / max(1.0, np.sqrt((u**2).mean())), h / np.sqrt(v)
        x, bias = x - 0.01 * (u + 0.1 * x), bias - 0.01 * w / max(1.0, np.sqrt((w**2).mean()))
        np.testing.assert_allclose(params["a"]["kernel"], x, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(params["a"]["bias"], bias, rtol=1e-4, atol=1e-6)


def newton_schulz(g):
    """Keller Jordan's five steps on a matrix whose rows are no more than its columns."""
    x = g / np.linalg.norm(g)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def test_muon_equals_numpy_for_each_layers_matrix():
    """Queries [layers, d, h, k] are one matrix [d, h k] a layer; embeddings, norms and biases are AdamW's."""
    rng = np.random.default_rng(2)
    q, norm, tokens = rng.normal(size=(2, 4, 2, 3)), rng.normal(size=4), rng.normal(size=(5, 4))
    tree = lambda a, b, c: {  # noqa: E731
        "layers": {"attention": {"q": {"kernel": jnp.asarray(a, jnp.float32)}}, "norm": {"scale": jnp.asarray(b, jnp.float32)}},
        "embed": {"tokens": jnp.asarray(c, jnp.float32)},
    }
    params = tree(q, norm, tokens)
    tx = optim.muon(0.01, weight_decay=0.1, clip_norm=1e9)
    alone = optim.adamw(0.01, b1=0.9, b2=0.95, weight_decay=0.1, clip_norm=1e9)
    state, other, m = jax.jit(tx.init)(params), jax.jit(alone.init)(params), 0.0
    update, update_alone = jax.jit(tx.update), jax.jit(alone.update)
    for t in range(1, 3):
        g = [rng.normal(size=x.shape) for x in (q, norm, tokens)]
        updates, state = update(tree(*g), state, params)
        adam, other = update_alone(tree(*g), other, params)
        m = 0.95 * m + 0.05 * g[0]
        nesterov = (0.95 * m / (1 - 0.95 ** (t + 1)) + 0.05 * g[0] / (1 - 0.95**t)).reshape(2, 4, 6)
        step = np.stack([newton_schulz(layer) for layer in nesterov]).reshape(q.shape)
        want = -0.01 * (0.2 * np.sqrt(6) * step + 0.1 * q)
        np.testing.assert_allclose(updates["layers"]["attention"]["q"]["kernel"], want, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(updates["embed"]["tokens"], adam["embed"]["tokens"], rtol=1e-5)
        np.testing.assert_allclose(updates["layers"]["norm"]["scale"], adam["layers"]["norm"]["scale"], rtol=1e-5)
    singular = np.linalg.svd(step.reshape(2, 4, 6), compute_uv=False)
    assert singular.min() > 0.5 and singular.max() < 1.3  # nearly orthogonal, as the coefficients make them


@pytest.mark.parametrize("path,shape,want", [
    ("policy/layers/attention/q/kernel", (2, 16, 4, 4), ((1,), (2, 3))),
    ("policy/layers/attention/kv_b/kernel", (2, 8, 2, 11), ((1,), (2, 3))),
    ("policy/encoder/layers/attention/o/kernel", (2, 4, 4, 16), ((1, 2), (3,))),
    ("policy/layers/ffn/experts/down/kernel", (2, 4, 8, 16), ((2,), (3,))),
    ("policy/mtp/layer/attention/q/kernel", (1, 16, 4, 4), ((1,), (2, 3))),
    ("policy/mtp/merge/kernel", (1, 32, 16), ((1,), (2,))),
    ("policy/layers/recurrent/kernel", (1, 8, 4, 8), ((1,), (2, 3))),
    ("policy/layers/ffn/router/kernel", (2, 16, 4), None),
    ("policy/layers/attention/q/bias", (2, 4, 4), None),
    ("policy/layers/ffn_norm/scale", (2, 16), None),
    ("policy/embed/tokens", (50, 16), None),
    ("policy/head/kernel", (16, 50), None),
    ("policy/lora/layers/attention/q/kernel/a", (2, 16, 4), None),
])  # fmt: skip
def test_which_parameters_muon_takes_and_how(path, shape, want):
    found = optim.matrix(path, len(shape))
    assert (found if found is None else tuple(found)) == want


def test_muon_without_a_matrix_is_refused():
    with pytest.raises(UserError, match="none of the trained parameters is a hidden layer's matrix; use optim.name=adamw"):
        optim.muon(0.1).init(PARAMS)


def test_bad_optimizer_settings_name_the_choices():
    config = pretrain.get_config()
    config.optim.name = "adamw2"
    with pytest.raises(UserError, match="optim.name='adamw2': choose one of adamw, adafactor, muon"):
        common.optimizer(config)
    config.optim.name, config.optim.moments = "muon", "float16"
    with pytest.raises(UserError, match="optim.moments='float16': choose one of float32, bfloat16"):
        common.optimizer(config)
