"""Optimizers by path: each sees its own parameters and no other."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm.train import optim
from jaxllm.train.partition import by_path, router_bias

PARAMS = {
    "policy": {
        "layers": {"ffn": {"router": {"kernel": jnp.ones((3, 2)), "bias": jnp.array([0.5, -0.5])}, "up": {"bias": jnp.ones(2)}}}
    }
}


def router(tree):
    return tree["policy"]["layers"]["ffn"]["router"]


def grads(bias, other):
    tree = jax.tree.map(lambda p: jnp.full_like(p, other), PARAMS)
    router(tree)["bias"] = jnp.asarray(bias)
    return tree


def test_the_bias_moves_by_the_sign_whatever_the_other_gradients_are():
    tx = router_bias(optim.adamw(0.1, clip_norm=1.0), rate=0.01)
    state = tx.init(PARAMS)
    for other in (0.0, 1e-3, 1e6):
        updates, state = tx.update(grads([1.0, -1.0], other), state, PARAMS)
        np.testing.assert_allclose(router(updates)["bias"], [-0.01, 0.01], rtol=1e-6)


def test_the_rest_is_what_it_would_be_alone():
    tx, alone = router_bias(optim.adamw(0.1, clip_norm=1.0), rate=0.01), optim.adamw(0.1, clip_norm=1.0)
    rest = grads([0.0, 0.0], 2.0)
    updates, _ = tx.update(grads([100.0, -100.0], 2.0), tx.init(PARAMS), PARAMS)
    expected, _ = alone.update(rest, alone.init(PARAMS), PARAMS)
    for side in (updates, expected):
        router(side).pop("bias")
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
    assert float(jnp.abs(router(updates)["kernel"]).min()) > 0


def test_the_first_rule_that_matches_wins_and_the_rest_takes_what_none_does():
    tx = by_path({"bias$": optax.sgd(1.0), "router": optax.sgd(2.0)}, optax.sgd(3.0))
    params = {**PARAMS, "head": jnp.ones(1)}
    updates, _ = tx.update({**grads([1.0, 1.0], 1.0), "head": jnp.ones(1)}, tx.init(params), params)
    flat = {tuple(k.key for k in path)[-2:]: float(v.reshape(-1)[0]) for path, v in jax.tree.leaves_with_path(updates)}
    assert flat == {("router", "bias"): -1, ("router", "kernel"): -2, ("up", "bias"): -1, ("head",): -3}


@pytest.mark.parametrize("seeds", [3])
def test_it_can_be_mapped_over_seeds(seeds):
    tx = router_bias(optim.adamw(0.1), rate=0.01)
    many = jax.tree.map(lambda p: jnp.stack([p] * seeds), PARAMS)
    states = jax.vmap(tx.init)(many)
    g = jax.tree.map(jnp.ones_like, many)
    updates, _ = jax.vmap(tx.update)(g, states, many)
    assert router(updates)["bias"].shape == (seeds, 2)
    np.testing.assert_allclose(router(updates)["bias"], -0.01, rtol=1e-6)
