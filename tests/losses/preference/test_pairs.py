"""Every loss on pairs against numpy, finite differences, its stated limits, and at extremes."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.losses import preference
from jaxllm.losses.preference import PairLogps, table
from tests.losses.preference import derived

ENTRIES = {e.name: e for e in table.PAIRS + table.FREE}
FIELDS = ("chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_length", "rejected_length")
RNG = np.random.default_rng(0)
REFERENCE = RNG.uniform(-30, -10, (2, 9))
VALUES = PairLogps(*(REFERENCE + RNG.normal(0, 3, (2, 9))), *REFERENCE, *RNG.integers(4, 12, (2, 9)).astype(float))
LOGPS = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), VALUES)
every = pytest.mark.parametrize("name", list(ENTRIES))


def pairs(chosen, rejected, ref_chosen=0.0, ref_rejected=0.0, length=1.0):
    columns = np.broadcast_arrays(chosen, rejected, ref_chosen, ref_rejected, length, length)
    return PairLogps(*(jnp.asarray(np.atleast_1d(c), jnp.float32) for c in columns))


def margin(h):
    """Pairs of one token whose log-ratio margin is h, half on either side."""
    return pairs(np.asarray(h) / 2, -np.asarray(h) / 2)


def swapped(p):
    return PairLogps(p.rejected, p.chosen, p.ref_rejected, p.ref_chosen, p.rejected_length, p.chosen_length)


def slope(fn, h):
    """d loss / d margin."""
    return jax.vmap(jax.grad(lambda x: fn(PairLogps(x[None] / 2, -x[None] / 2, *jnp.zeros((2, 1)), *jnp.ones((2, 1))))[0]))(
        jnp.atleast_1d(jnp.asarray(h, jnp.float32))
    )


def test_every_loss_is_derived_here_and_in_the_table():
    assert set(ENTRIES) == set(derived.LOSSES)


@every
def test_values_equal_numpy(name):
    entry = ENTRIES[name]
    expected = derived.LOSSES[name](derived.Pairs(VALUES), **entry.hyper)
    got = entry.fn(LOGPS, **entry.hyper)
    assert got.shape == (9,) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=1e-5)


@every
def test_gradients_equal_finite_differences_of_the_derivation(name):
    entry = ENTRIES[name]
    grads = jax.grad(lambda p: entry.fn(p, **entry.hyper).sum())(LOGPS)

    def total(field, i, step):
        column = getattr(VALUES, field).copy()
        column[i] += step
        return derived.LOSSES[name](derived.Pairs(VALUES.replace(**{field: column})), **entry.hyper).sum()

    for field in ("chosen", "rejected"):
        expected = [(total(field, i, 1e-5) - total(field, i, -1e-5)) / 2e-5 for i in range(9)]
        np.testing.assert_allclose(getattr(grads, field), expected, rtol=1e-3, atol=1e-5, err_msg=field)


@every
def test_extremes_and_empty_completions_stay_finite(name):
    entry = ENTRIES[name]
    corners = np.array(list(itertools.product((0.0, -1e-3, -1e4), (0.0, -1e4), (0.0, -1e4), (0.0, -1e4), (0, 1, 50), (0, 1, 50))))
    grid = PairLogps(*jnp.asarray(corners.T, jnp.float32))
    margins = np.asarray(preference.log_ratio_margin(grid))
    assert margins.min() == -2e4 and margins.max() == 2e4 and (np.abs(margins) == 1e4).any()
    values, grads = jax.vmap(
        lambda p: jax.value_and_grad(lambda q: entry.fn(q, **entry.hyper).sum())(jax.tree.map(lambda x: x[None], p))
    )(grid)
    assert np.isfinite(values).all()
    assert all(np.isfinite(getattr(grads, f)).all() for f in FIELDS[:4])


@pytest.mark.parametrize("name", [n for n in ENTRIES if n not in ("sppo_hard", "ipo")])
def test_losses_of_far_pairs_stay_finite_whatever_beta(name):
    entry = ENTRIES[name]
    for beta in (1e-3, 1.0, 10.0):
        hyper = entry.hyper | ({"beta": beta} if "beta" in entry.hyper else {})
        values, grads = jax.value_and_grad(lambda p, h=hyper: entry.fn(p, **h).sum())(margin([-1e4, -1.0, 0.0, 1.0, 1e4]))
        assert np.isfinite(values) and all(np.isfinite(getattr(grads, f)).all() for f in FIELDS[:4])


@pytest.mark.parametrize("name", ["dpo", "dpo_norm", "cdpo", "robust", "aot", "aot_unpaired", "reverse_kl", "forward_kl",
                                  "jensen_shannon", "alpha_divergence", "reference_free", "cpo"])  # fmt: skip
def test_without_beta_nothing_is_learnt(name):
    fn = partial(ENTRIES[name].fn, **ENTRIES[name].hyper | {"beta": 0.0})
    np.testing.assert_allclose(fn(LOGPS), np.log(2), rtol=1e-5)
    assert not np.asarray(jax.grad(lambda p: fn(p).sum())(LOGPS).chosen).any()


AT_A_TIE = {"dpo": np.log(2), "hinge": 1, "nca_pair": 2 * np.log(2), "bco_pair": 2 * np.log(2), "sppo_hard": 50, "apo_zero": 1,
            "apo_down": 1, "ipo": 1, "forward_kl": np.log(2), "jensen_shannon": np.log(2), "alpha_divergence": np.log(2),
            "discopop": (np.log(2) + 1) / 2, "orpo": 0.1 * np.log(2), "simpo": np.log1p(np.e)}  # fmt: skip


@pytest.mark.parametrize("name", list(AT_A_TIE))
def test_ties_at_the_reference(name):
    tie = pairs(-3.0, -3.0, -3.0, -3.0, length=2.0)
    np.testing.assert_allclose(ENTRIES[name].fn(tie, **ENTRIES[name].hyper), AT_A_TIE[name], rtol=1e-5)


def test_dpo_gradient():
    h = np.asarray(preference.log_ratio_margin(LOGPS))
    grads = jax.grad(lambda p: preference.dpo(p, beta=0.3).sum())(LOGPS)
    np.testing.assert_allclose(grads.chosen, -0.3 / (1 + np.exp(0.3 * h)), rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(grads.chosen, -grads.rejected)


def test_label_smoothing():
    for fn in (preference.cdpo, preference.robust):
        np.testing.assert_allclose(fn(LOGPS, beta=0.3, label_smoothing=0.0), preference.dpo(LOGPS, beta=0.3), rtol=1e-6)
    half = partial(preference.cdpo, beta=0.3, label_smoothing=0.5)
    np.testing.assert_allclose(half(LOGPS), half(swapped(LOGPS)), rtol=1e-5)
    robust = partial(preference.robust, beta=0.3, label_smoothing=0.2)
    unbiased = 0.8 * robust(LOGPS) + 0.2 * robust(swapped(LOGPS))
    np.testing.assert_allclose(unbiased, preference.dpo(LOGPS, beta=0.3), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(slope(robust, 1e4), -0.3 * 0.2 / 0.6, rtol=1e-5)


MINIMA = {
    "cdpo": (dict(beta=0.5, label_smoothing=0.2), np.log(4) / 0.5),
    "exo_pair": (dict(beta=0.5, label_smoothing=0.2), np.log(4) / 0.5),
    "ipo": (dict(beta=0.5), 1.0),
    "sppo_hard": (dict(beta=0.5), 2.0),
}


@pytest.mark.parametrize("name", list(MINIMA))
def test_minima_lie_where_they_are_said_to(name):
    hyper, best = MINIMA[name]
    fn = partial(ENTRIES[name].fn, **hyper)
    below, at, above = slope(fn, np.array([best - 0.1, best, best + 0.1]))
    assert below < 0 < above and abs(at) < 1e-5


def test_nca_raises_the_chosen_to_two_thirds():
    grad = jax.grad(lambda w: preference.nca_pair(pairs_of(w), beta=0.5).sum())
    pairs_of = lambda w: PairLogps(w, *jnp.zeros((5, 1)))  # noqa: E731
    assert abs(grad(jnp.array([np.log(2) / 0.5]))[0]) < 1e-6 and grad(jnp.zeros(1))[0] < 0


def test_the_bound_of_bco_on_dpo():
    assert (preference.bco_pair(LOGPS, beta=0.3) >= preference.dpo(LOGPS, beta=0.3)).all()
    far = pairs(30.0, -30.0)
    np.testing.assert_allclose(preference.bco_pair(far, beta=0.3), preference.dpo(far, beta=0.3), atol=3e-4)


def test_hinge_ends_at_one():
    fn = partial(preference.hinge, beta=0.5)
    np.testing.assert_allclose(slope(fn, [-5.0, 1.9, 2.1, 50.0]), [-0.5, -0.5, 0, 0])


def test_discopop_is_dpo_below_and_exponential_above():
    fn = partial(preference.discopop, beta=0.1, tau=0.05)
    low, high = margin(-50.0), margin(50.0)
    np.testing.assert_allclose(fn(low), preference.dpo(low, beta=0.1), rtol=1e-5)
    np.testing.assert_allclose(fn(high), np.exp(-5.0), rtol=1e-5)
    assert (slope(fn, np.linspace(-3, 3, 61)) > 0).any(), "the stretch with the sign reversed"


def test_special_cases():
    np.testing.assert_array_equal(preference.reverse_kl(LOGPS, beta=0.3), preference.dpo(LOGPS, beta=0.3))
    alpha = partial(preference.alpha_divergence, LOGPS, beta=0.3)
    np.testing.assert_allclose(alpha(alpha=0.0), preference.dpo(LOGPS, beta=0.3), rtol=1e-6)
    np.testing.assert_allclose(alpha(alpha=1e-3), preference.dpo(LOGPS, beta=0.3), rtol=0.05, atol=5e-3)
    np.testing.assert_array_equal(alpha(alpha=1.0), preference.forward_kl(LOGPS, beta=0.3))
    simpo = partial(preference.simpo, LOGPS, beta=2.0)
    np.testing.assert_allclose(preference.alphapo(LOGPS, beta=2.0, gamma=1.0, alpha=0.0), simpo(gamma=1.0), rtol=1e-6)
    one = LOGPS.replace(chosen_length=jnp.ones(9), rejected_length=jnp.ones(9))
    np.testing.assert_allclose(preference.simpo(one, beta=0.3, gamma=0.0), preference.cpo(one, beta=0.3), rtol=1e-4)
    np.testing.assert_allclose(preference.dpo_norm(one, beta=0.3), preference.dpo(one, beta=0.3), rtol=1e-6)
    np.testing.assert_array_equal(preference.unlikelihood(LOGPS, alpha=0.0), preference.preferred_ft(LOGPS))
    uniform = LOGPS.replace(ref_chosen=jnp.full(9, -7.0), ref_rejected=jnp.full(9, -7.0))
    np.testing.assert_allclose(preference.reference_free(LOGPS, beta=0.2), preference.dpo(uniform, beta=0.2), rtol=1e-4)


@pytest.mark.parametrize("name", [e.name for e in table.FREE])
def test_losses_without_a_reference_do_not_read_it(name):
    fn, hyper = ENTRIES[name].fn, ENTRIES[name].hyper
    other = LOGPS.replace(ref_chosen=jnp.full(9, jnp.nan), ref_rejected=jnp.full(9, jnp.nan))
    np.testing.assert_array_equal(fn(other, **hyper), fn(LOGPS, **hyper))


def test_divergences_agree_with_dpo_to_first_order():
    at = {n: float(slope(partial(ENTRIES[n].fn, **ENTRIES[n].hyper), 0.0)[0]) for n in derived.LOSSES if "reference" not in n}
    assert at["forward_kl"] == pytest.approx(at["dpo"]) == pytest.approx(at["alpha_divergence"])
    assert at["jensen_shannon"] == pytest.approx(at["dpo"] / 2)


def test_clamps_end_the_gradient():
    grad = lambda fn: jax.grad(lambda c: fn(pairs_with(c)).sum())  # noqa: E731
    pairs_with = lambda c: pairs(0.0, 0.0).replace(chosen=c)  # noqa: E731
    forward = grad(partial(preference.forward_kl, beta=1e-20))
    assert forward(jnp.array([-39.0]))[0] != 0 and forward(jnp.array([-41.0]))[0] == 0
    power = grad(partial(preference.alphapo, beta=1.0, gamma=0.0, alpha=0.5))
    assert power(jnp.array([-79.0]))[0] != 0 and power(jnp.array([-81.0]))[0] == 0


def test_optimal_transport_sorts_the_batch():
    for name in ("aot", "aot_unpaired"):
        fn = partial(ENTRIES[name].fn, beta=0.3)
        one = jax.tree.map(lambda x: x[:1], LOGPS)
        np.testing.assert_allclose(fn(one), preference.dpo(one, beta=0.3), rtol=1e-5)
        assert abs(float(fn(LOGPS).sum() - preference.dpo(LOGPS, beta=0.3).sum())) > 1e-3
    shuffled = LOGPS.replace(rejected=LOGPS.rejected[::-1], ref_rejected=LOGPS.ref_rejected[::-1])
    np.testing.assert_array_equal(preference.aot_unpaired(LOGPS, beta=0.3), preference.aot_unpaired(shuffled, beta=0.3))


def test_a_combination_is_the_weighted_sum():
    fn = preference.combined((preference.dpo, 0.8), (preference.bco_pair, 0.2), (preference.preferred_ft, 1.0))
    expected = 0.8 * preference.dpo(LOGPS, beta=0.1) + 0.2 * preference.bco_pair(LOGPS, beta=0.1) + preference.preferred_ft(LOGPS)
    np.testing.assert_allclose(fn(LOGPS, beta=0.1), expected, rtol=1e-6)
