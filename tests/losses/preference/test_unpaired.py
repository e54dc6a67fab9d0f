"""KTO and its siblings on labelled completions: numpy, limits, extremes, the builder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.losses import preference
from jaxllm.losses.preference import RowLogps, table
from tests.losses import bigram
from tests.losses.preference.derived import UNPAIRED

ENTRIES = {e.name: e for e in table.UNPAIRED}
RNG = np.random.default_rng(0)
X = RNG.normal(0, 4, 10)
REFERENCE = RNG.uniform(-30, -10, 10)
LABEL = np.arange(10) % 3 > 0
KL = 0.7
every = pytest.mark.parametrize("name", list(ENTRIES))


def rows(x, label=LABEL, kl=KL, reference=REFERENCE):
    return RowLogps(*(jnp.asarray(v, jnp.float32) for v in (reference + x, reference)), jnp.asarray(label), jnp.float32(kl))


@every
def test_values_equal_numpy(name):
    np.testing.assert_allclose(ENTRIES[name].fn(rows(X), beta=0.3), UNPAIRED[name](X, LABEL, KL, 0.3), rtol=1e-4, atol=1e-6)


def test_kto_weighs_the_two_kinds():
    weights = dict(desirable_weight=1.5, undesirable_weight=0.5)
    got = preference.kto(rows(X), beta=0.3, **weights)
    np.testing.assert_allclose(got, UNPAIRED["kto"](X, LABEL, KL, 0.3, **weights), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(preference.kto(rows(0 * X, kl=0.0), beta=0.3), 0.5, rtol=1e-6)
    zero = preference.kto(rows(X, kl=0.0), beta=0.3)
    np.testing.assert_allclose(preference.apo_zero_unpaired(rows(X), beta=0.3), zero, rtol=1e-6)


@every
def test_gradients_equal_finite_differences(name):
    grad = jax.grad(lambda p: ENTRIES[name].fn(p, beta=0.3).sum(), allow_int=True)(rows(X))
    shift = {"kto": KL, "apo_zero_unpaired": 0.0}.get(name)

    def losses(x):
        if shift is not None:
            return UNPAIRED[name](x, LABEL, shift, 0.3)
        sign = np.where(LABEL, 1, -1)  # bco's shift carries no gradient
        return np.log1p(np.exp(-sign * 0.3 * (x - (X[LABEL].mean() + X[~LABEL].mean()) / 2)))

    expected = (losses(X + 1e-5) - losses(X - 1e-5)) / 2e-5
    np.testing.assert_allclose(grad.policy, expected, rtol=1e-3, atol=1e-6)


@every
def test_extremes_and_batches_of_one_kind_stay_finite(name):
    for label in (LABEL, np.ones(10, bool), np.zeros(10, bool)):
        far = rows(np.linspace(-1e4, 1e4, 10), label, kl=1e4, reference=0 * X)
        values, grads = jax.value_and_grad(lambda p: ENTRIES[name].fn(p, beta=0.5).sum(), allow_int=True)(far)
        assert np.isfinite(values) and np.isfinite(grads.policy).all()


def test_bco_is_shifted_by_the_mean_reward():
    moved = preference.bco(rows(X + 5.0), beta=0.3)
    np.testing.assert_allclose(moved, preference.bco(rows(X), beta=0.3), rtol=1e-4)
    np.testing.assert_allclose(preference.bco(rows(X), beta=0.0), np.log(2), rtol=1e-6)


PARAMS, OLD = bigram.params(0), bigram.params(1)
COMPLETION, MISMATCHED = bigram.record(6, 6, seed=1), bigram.record(6, 6, seed=2)
GOOD = np.array([True, False, True, True, False, False])


def sums(params, record):
    return (bigram.logps(params, record) * record["mask"]).sum(1)


def batch(completion=COMPLETION, mismatched=MISMATCHED, label=GOOD):
    return {
        "completion": completion, "mismatched": mismatched, "label": label,
        "ref_logps": sums(OLD, completion).astype(np.float32),
        "ref_mismatched_logps": sums(OLD, mismatched).astype(np.float32),
    }  # fmt: skip


def test_the_builder_equals_numpy_and_has_the_names_of_trl():
    loss_fn = preference.row_loss(bigram.MODEL, preference.kto, beta=0.3, chunk=7, undesirable_weight=0.5)
    mean, metrics = jax.jit(loss_fn)({"policy": PARAMS}, batch(), jax.random.key(0))
    x = sums(PARAMS, COMPLETION) - sums(OLD, COMPLETION)
    kl = max((sums(PARAMS, MISMATCHED) - sums(OLD, MISMATCHED)).mean(), 0)
    expected = {
        "loss": UNPAIRED["kto"](x, GOOD, kl, 0.3, undesirable_weight=0.5).mean(), "kl": kl,
        "rewards/chosen": 0.3 * x[GOOD].mean(), "rewards/rejected": 0.3 * x[~GOOD].mean(),
        "rewards/margins": 0.3 * (x[GOOD].mean() - x[~GOOD].mean()),
        "logps/chosen": sums(PARAMS, COMPLETION)[GOOD].mean(), "logps/rejected": sums(PARAMS, COMPLETION)[~GOOD].mean(),
        "rows/empty": 0,
    }  # fmt: skip
    assert set(metrics) == set(expected) and mean.count == 6
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name].value(), value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("policy,positive", [(PARAMS, None), (OLD, False)])
def test_kl_is_never_negative_and_carries_no_gradient(policy, positive):
    def loss(params, mismatched):
        return preference.row_loss(bigram.MODEL, preference.kto, beta=0.3)({"policy": params}, batch(mismatched=mismatched), None)

    mean, metrics = loss(policy, MISMATCHED)
    assert metrics["kl"].value() >= 0 and (positive is None or abs(metrics["kl"].value()) < 1e-5)
    kl = metrics["kl"].value()

    def with_constant(params):
        policy_sums = preference.sequence_logps(bigram.MODEL, params, COMPLETION)
        return preference.kto(RowLogps(policy_sums, batch()["ref_logps"], GOOD, kl), beta=0.3).sum()

    got, expected = jax.grad(lambda p: loss(p, MISMATCHED)[0].total)(policy), jax.grad(with_constant)(policy)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, expected)


@every
def test_empty_completions_teach_nothing_and_are_counted(name):
    none = {**COMPLETION, "mask": np.zeros_like(COMPLETION["mask"])}
    empty = {**MISMATCHED, "mask": np.zeros_like(MISMATCHED["mask"])}
    loss_fn = preference.row_loss(bigram.MODEL, ENTRIES[name].fn, beta=0.3)
    mean, metrics = loss_fn({"policy": PARAMS}, batch(none, empty), None)
    grads = jax.grad(lambda p: loss_fn({"policy": p}, batch(none, empty), None)[0].total)(PARAMS)
    assert metrics["rows/empty"].total == 6 and metrics["kl"].value() == 0 and np.isfinite(mean.value())
    assert all(not np.asarray(x).any() for x in jax.tree.leaves(grads))


def test_empty_mismatched_completions_do_not_dilute_kl():
    some = {**MISMATCHED, "mask": MISMATCHED["mask"] & (np.arange(6) < 3)[:, None]}
    swapped = batch(mismatched=some)
    swapped["ref_mismatched_logps"] = swapped["ref_mismatched_logps"] - 20.0 * (np.arange(6) < 3).astype(np.float32)
    metrics = preference.row_loss(bigram.MODEL, preference.kto, beta=0.3)({"policy": PARAMS}, swapped, None)[1]
    x = (sums(PARAMS, some) - swapped["ref_mismatched_logps"])[:3]
    np.testing.assert_allclose(metrics["kl"].value(), x.mean(), rtol=1e-4)
