"""Two outcomes, the first always preferred: where DPO and IPO end (arXiv 2310.12036, sections 4 and 5)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.losses import preference
from jaxllm.losses.preference import PairLogps


def margins(fn, rate, steps):
    """log pi(first)/pi(second) along gradient descent on two logits from the uniform reference: [steps + 1]."""
    reference = jnp.log(jnp.array([0.5, 0.5]))

    def loss(theta):
        logp = jax.nn.log_softmax(theta)
        columns = (logp[0], logp[1], *reference, jnp.float32(1), jnp.float32(1))
        return fn(PairLogps(*(x[None] for x in columns)))[0]

    def step(theta, _):
        moved = theta - rate * jax.grad(loss)(theta)
        return moved, moved[0] - moved[1]

    return np.asarray(jax.jit(lambda t: jax.lax.scan(step, t, length=steps)[1])(jnp.zeros(2)))


@pytest.mark.parametrize("tau", [0.05, 0.1, 0.5])
def test_ipo_ends_at_a_margin_of_half_over_tau_and_stays(tau):
    path = margins(partial(preference.ipo, beta=tau), rate=0.05, steps=4000)
    np.testing.assert_allclose(path[500:], 1 / (2 * tau), rtol=1e-4)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_dpo_grows_without_bound_however_strong_its_regularisation(beta):
    path = margins(partial(preference.dpo, beta=beta), rate=1 / beta**2, steps=16000)
    assert (np.diff(path[:1000]) > 0).all()
    at = path[[999, 3999, 15999]] * beta
    # d margin/dt = 2 sigmoid(-margin) in these units: the margin goes like log t, by log 4 at every fourfold time
    np.testing.assert_allclose(np.diff(at), np.log(4), rtol=0.02)


def test_labels_that_are_sometimes_flipped_bound_conservative_dpo():
    path = margins(partial(preference.cdpo, beta=1.0, label_smoothing=0.1), rate=0.5, steps=4000)
    np.testing.assert_allclose(path[2000:], np.log(9), rtol=1e-4)
