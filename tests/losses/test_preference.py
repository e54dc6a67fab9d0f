"""Pair losses against numpy, their stated limits, and the builder."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.losses import preference
from jaxllm.losses.preference import PairLogps
from tests.losses import bigram

RNG = np.random.default_rng(0)
VALUES = RNG.normal(-20, 8, (4, 9)).astype(np.float32)
LOGPS = PairLogps(*map(jnp.asarray, VALUES), jnp.full(9, 4.0), jnp.full(9, 6.0))
H = (VALUES[0] - VALUES[2]) - (VALUES[1] - VALUES[3])
SIBLINGS = {
    "dpo": preference.dpo,
    "cdpo": partial(preference.cdpo, label_smoothing=0.1),
    "reference_free": preference.reference_free,
}


def softplus(x):
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


def swapped(p):
    return PairLogps(p.rejected, p.chosen, p.ref_rejected, p.ref_chosen, p.rejected_length, p.chosen_length)


def test_values_equal_numpy():
    beta, e = 0.3, 0.1
    np.testing.assert_allclose(preference.log_ratio_margin(LOGPS), H, rtol=1e-5)
    np.testing.assert_allclose(preference.dpo(LOGPS, beta=beta), softplus(-beta * H), rtol=1e-4, atol=1e-6)
    expected = (1 - e) * softplus(-beta * H) + e * softplus(beta * H)
    np.testing.assert_allclose(
        preference.cdpo(LOGPS, beta=beta, label_smoothing=e), expected, rtol=1e-4, atol=1e-6
    )
    expected = softplus(-beta * (VALUES[0] - VALUES[1]))
    np.testing.assert_allclose(preference.reference_free(LOGPS, beta=beta), expected, rtol=1e-4, atol=1e-6)


def test_dpo_limits():
    np.testing.assert_allclose(preference.dpo(LOGPS, beta=0.0), np.log(2), rtol=1e-6)
    grad = jax.grad(lambda c: preference.dpo(LOGPS.replace(chosen=c), beta=0.3).sum())(LOGPS.chosen)
    np.testing.assert_allclose(grad, -0.3 / (1 + np.exp(0.3 * H)), rtol=1e-4, atol=1e-7)
    grad = jax.grad(lambda c: preference.dpo(LOGPS.replace(rejected=c), beta=0.3).sum())(LOGPS.rejected)
    np.testing.assert_allclose(grad, 0.3 / (1 + np.exp(0.3 * H)), rtol=1e-4, atol=1e-7)


def test_cdpo_limits():
    np.testing.assert_array_equal(
        preference.cdpo(LOGPS, beta=0.3, label_smoothing=0.0), preference.dpo(LOGPS, beta=0.3)
    )
    half = partial(preference.cdpo, beta=0.3, label_smoothing=0.5)
    np.testing.assert_allclose(half(LOGPS), half(swapped(LOGPS)), rtol=1e-5)
    # the minimum lies where beta h = log((1 - e) / e)
    e, beta = 0.2, 0.5
    zero = jnp.zeros(1)

    def at(h):
        return preference.cdpo(PairLogps(h, zero, zero, zero, zero, zero), beta=beta, label_smoothing=e)[0]

    best = jnp.array([np.log((1 - e) / e) / beta])
    assert abs(jax.grad(lambda h: at(h))(best)[0]) < 1e-6
    assert at(best) < min(at(best - 0.1), at(best + 0.1))


def test_reference_free_is_dpo_with_a_uniform_reference():
    uniform = LOGPS.replace(ref_chosen=jnp.full(9, -7.0), ref_rejected=jnp.full(9, -7.0))
    np.testing.assert_allclose(
        preference.reference_free(LOGPS, beta=0.2), preference.dpo(uniform, beta=0.2), rtol=1e-4
    )


@pytest.mark.parametrize("name", list(SIBLINGS))
def test_a_smaller_margin_costs_more_and_extremes_stay_finite(name):
    fn = partial(SIBLINGS[name], beta=0.5)
    extreme = jnp.array([-1e4, 0.0, -1e4, -1e-3])
    pairs = PairLogps(extreme, extreme[::-1], jnp.zeros(4), jnp.zeros(4), jnp.ones(4), jnp.ones(4))
    value, grads = jax.value_and_grad(lambda p: fn(p).sum())(pairs)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    if name != "cdpo":
        assert (np.asarray(fn(LOGPS.replace(chosen=LOGPS.chosen - 1))) > np.asarray(fn(LOGPS))).all()


PARAMS, REFERENCE = bigram.params(0), bigram.params(1)
CHOSEN, REJECTED = bigram.record(4, 6, seed=1), bigram.record(4, 6, seed=2)


def sums(params, record):
    return (bigram.logps(params, record) * record["mask"]).sum(1)


def batch(rows=slice(None)):
    columns = {
        "chosen": CHOSEN, "rejected": REJECTED,
        "ref_chosen_logps": sums(REFERENCE, CHOSEN).astype(np.float32),
        "ref_rejected_logps": sums(REFERENCE, REJECTED).astype(np.float32),
    }  # fmt: skip
    return jax.tree.map(lambda x: x[rows], columns)


def test_the_builder_equals_numpy_and_has_the_names_of_trl():
    loss_fn = preference.loss(bigram.MODEL, preference.dpo, beta=0.4, nll_weight=0.5, chunk=7)
    mean, metrics = jax.jit(loss_fn)({"policy": PARAMS}, batch(), jax.random.key(0))
    chosen, rejected = sums(PARAMS, CHOSEN), sums(PARAMS, REJECTED)
    rewards = [0.4 * (s - sums(REFERENCE, r)) for s, r in ((chosen, CHOSEN), (rejected, REJECTED))]
    nll = -chosen / CHOSEN["mask"].sum(1)
    expected = {
        "loss": (softplus(rewards[1] - rewards[0]) + 0.5 * nll).mean(),
        "rewards/chosen": rewards[0].mean(), "rewards/rejected": rewards[1].mean(),
        "rewards/margins": (rewards[0] - rewards[1]).mean(),
        "rewards/accuracies": (rewards[0] > rewards[1]).mean(),
        "logps/chosen": chosen.mean(), "logps/rejected": rejected.mean(), "nll_loss": nll.mean(),
    }  # fmt: skip
    assert set(metrics) == set(expected) and mean.count == 4
    np.testing.assert_allclose(mean.value(), expected["loss"], rtol=1e-4)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name].value(), value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_only_completion_tokens_count():
    """Prompt targets and padding change nothing: masked equals dropped."""
    got = preference.pair_logps(bigram.MODEL, PARAMS, batch())
    np.testing.assert_allclose(got.chosen, sums(PARAMS, CHOSEN), rtol=1e-5)
    np.testing.assert_array_equal(got.chosen_length, CHOSEN["mask"].sum(1))
    changed = batch()
    outside = ~changed["chosen"]["mask"]
    changed["chosen"] = {**changed["chosen"], "targets": np.where(outside, 3, changed["chosen"]["targets"])}
    np.testing.assert_array_equal(preference.pair_logps(bigram.MODEL, PARAMS, changed).chosen, got.chosen)


def test_hyper_parameters_may_be_traced():
    """A sweep calls the builder inside a vmapped function."""

    def at(beta):
        return preference.loss(bigram.MODEL, preference.dpo, beta=beta)({"policy": PARAMS}, batch(), None)[
            0
        ].value()

    betas = jnp.array([0.0, 0.3])
    np.testing.assert_allclose(jax.jit(jax.vmap(at))(betas), [np.log(2), float(at(0.3))], rtol=1e-5)
