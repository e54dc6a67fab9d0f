"""PPO-ptx in the lab: without a reward it is supervised training on the pretraining text, and with a coefficient of 0 nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.studies import lab
from experiments.studies.lab import skills
from jaxllm.losses import lm
from jaxllm.train.step import make_train_step
from jaxllm.worlds import pref


def test_without_a_reward_ptx_is_supervised_training(quick_compile):
    labs = lab.make(6, vocab=8, width=8, layers=1)
    world = pref.make(jax.random.key(0), vocab=8, length=6, good=3)
    params = lab.fresh(labs.model, jax.random.key(1))
    text, tx = skills.text(world, jax.random.key(2), 8), optax.adam(1e-2)
    data = {"ground": lab.Ground(world, params, jnp.float32(0), jnp.float32(1))}
    nothing = lambda d, record: jnp.zeros(record["tokens"].shape[0])  # noqa: E731
    step = jax.jit(lab.policy_step(labs, nothing, tx, batch=4, epochs=1, pretraining=lambda d, key: text))
    state = lab.start(tx, {"policy": params})

    def after(ptx_coef):
        hyper = {"kl_coef": jnp.float32(0), "ptx_coef": jnp.float32(ptx_coef)}
        return jax.tree.leaves(step(state, data, hyper, jax.random.key(3))[0].params)

    def change(new):
        return max(float(np.abs(a - b).max()) for a, b in zip(new, jax.tree.leaves(state.params), strict=True))

    supervised, _ = jax.jit(make_train_step(lm.loss(labs.model), tx))(state, {}, text, jax.random.key(4))
    for a, b in zip(after(1.0), jax.tree.leaves(supervised.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert change(jax.tree.leaves(supervised.params)) > 1e-3 and change(after(0.0)) == 0.0
