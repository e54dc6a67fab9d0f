"""What the studies of over-optimisation and of frontiers compute from curves and scores, against numbers that are known."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies import lab
from experiments.studies.lab import goodhart, halves, selection, skills
from jaxllm.evals import passk
from jaxllm.worlds import pref


def kl_by_hand(p, order, n):
    """KL(best of n, p) of a finite distribution p whose outcomes are ranked by `order` (equal ranks tie)."""
    total = 0.0
    for i in range(len(p)):
        tied = order == order[i]
        below, upto = p[order < order[i]].sum(), p[order <= order[i]].sum()
        q = (upto**n - below**n) * p[i] / p[tied].sum()  # within a tie the first drawn wins
        total += q * np.log(q / p[i])
    return total


@pytest.mark.parametrize("n", [1, 2, 5, 40])
def test_plug_in_kl_is_that_of_the_empirical_distribution(n):
    counts, order = np.array([3, 1, 4, 2, 6]), np.array([0.5, -1.0, 2.0, 0.5, 1.0])
    scores = np.repeat(order, counts)
    assert selection.plug_in_kl(scores, n) == pytest.approx(kl_by_hand(counts / 16, order, n), abs=1e-12)
    assert selection.plug_in_kl(scores, n) <= passk.best_of_n_kl(n) + 1e-12


def test_without_ties_the_bound_is_met_and_a_constant_score_selects_nothing():
    rng = np.random.default_rng(0)
    for n in (1, 4, 64):
        assert selection.plug_in_kl(rng.normal(size=50_000), n) == pytest.approx(passk.best_of_n_kl(n), abs=1e-3)
    assert selection.plug_in_kl(np.ones(100), 16) == pytest.approx(0, abs=1e-12)


def test_kl_from_drawn_groups_is_the_true_one():
    """Eight outcomes of known probability: heavy ties, which put it below the bound; and none, which leaves it there."""
    rng = np.random.default_rng(1)
    p, order = np.array([0.3, 0.2, 0.15, 0.1, 0.1, 0.08, 0.05, 0.02]), np.array([3.0, 1, 7, 0, 2, 5, 6, 4])
    drawn = rng.choice(8, size=200_000, p=p)
    found = selection.drawn_kl(order[drawn], np.log(p)[drawn], 8)
    assert found == pytest.approx(kl_by_hand(p, order, 8), abs=0.02) and found < passk.best_of_n_kl(8) - 0.04
    many = rng.normal(size=200_000)
    assert selection.drawn_kl(many, np.full(200_000, -25.0), 8) == pytest.approx(passk.best_of_n_kl(8), abs=0.03)


def test_best_of_n_curves():
    rng = np.random.default_rng(2)
    proxy = rng.normal(size=(2, 400))
    found = selection.best_of(proxy, proxy**2, (1, 4, 400))
    assert found["kl"].shape == found["gold"].shape == (2, 3) and found["bound"].shape == (3,)
    np.testing.assert_allclose(found["proxy"][:, 0], proxy.mean(axis=1))
    np.testing.assert_allclose(found["proxy"][:, 2], proxy.max(axis=1))
    np.testing.assert_allclose(found["gold"][:, 2], proxy.max(axis=1) ** 2)
    assert (found["kl"] <= found["bound"] + 1e-12).all() and (np.diff(found["proxy"]) > 0).all()


@pytest.mark.parametrize("log", [True, False])
def test_fits_recover_their_law(log):
    kl = np.linspace(0, 20, 12)
    d = np.sqrt(kl)
    gold = d * (1.3 - 0.4 * (np.log(np.maximum(d, 1e-9)) if log else d))
    np.testing.assert_allclose(goodhart.goodhart_fit(kl, gold, log), [1.3, 0.4, 1.0], rtol=1e-6)
    assert goodhart.goodhart_fit(kl, gold, not log)[2] < 0.99
    assert np.isnan(goodhart.goodhart_fit(kl[:3], gold[:3], log)).all()


def test_peaks_and_matched_kl():
    curves = {
        "gold": np.array([[0.0, 1.0, 0.4, -0.5], [0.0, 0.1, 0.2, 0.3]]), "kl": np.array([[0.0, 2, 5, 9], [0.0, 1, 2, 3]]),
        "proxy": np.array([[0.0, 0.8, 1.0, 1.1], [0.0, 0.2, 0.1, 0.4]]),
    }  # fmt: skip
    f = goodhart.peak_facts(curves)
    assert f["inside"].tolist() == [1, 0] and f["peak"].tolist() == [1.0, 0.3] and f["peak_kl"].tolist() == [2, 3]
    np.testing.assert_allclose(f["lost"], [1.5, 0])
    np.testing.assert_allclose(f["proxy_rise"], [0.3, 0])
    assert goodhart.kl_at(curves["kl"][0], curves["proxy"][0], 0.9) == pytest.approx(3.5)
    assert np.isnan(goodhart.kl_at(curves["kl"][0], curves["proxy"][0], 2.0))
    assert np.isnan(goodhart.kl_at(curves["kl"][0], curves["proxy"][0], 0.0))  # reached before the first step


def test_points_are_chosen_on_one_half_and_measured_on_the_other():
    x = {
        "kl": np.array([[[0.0, 1, 2]], [[0.0, 1.5, 3]]]), "gold": np.array([[[0.0, 1.0, 0.5]], [[0.0, 0.9, 2.0]]]),
        "test_kl": np.array([[[0.0, 1.1, 2.1]], [[0.0, 1.6, 3.1]]]),
        "test_gold": np.array([[[0.0, 0.8, 5.0]], [[0.0, 7.0, 1.5]]]),
        "step": np.array([[[0, 10, 20]], [[0, 10, 20]]]),
    }  # fmt: skip
    kl, gold = halves.points(x, 0)
    assert kl.tolist() == [0, 1.1, 3.1] and gold.tolist() == [0, 0.8, 1.5]
    assert halves.best(x, "gold").tolist() == [1.5] and halves.best(x, "kl").tolist() == [3.1]
    assert halves.steps_to_best(x) == 10  # setting 1 has 7.0 on the measured half after 10 steps
    rates = halves.wins(jnp.asarray([-1.0, 0.0, 3.0]), jnp.asarray([0.0, 0.0, 1.0, 2.0]))
    np.testing.assert_allclose(rates, [0, 0.25, 1])


def test_flops_are_those_of_a_count_by_hand():
    c = SimpleNamespace(length=2, pairs=3, judge_steps=5, batch_size=7, rl_batch=11, epochs=2)
    found = halves.flops(c, 100, 10, 4, 6)
    assert found["DPO"] == 2 * (2 * 3 * 2 * 200) + 4 * (14 * 2 * 600)
    judge = 5 * 128 * 2 * 60 + 1024 * 2 * 220
    assert found["PPO"] == 2 * 3 * 2 * 200 + judge + 6 * 11 * 2 * (200 + 200 + 20 + 1200)


def test_shuffled_pairs_swap_whole_sides_half_of_the_time():
    rng = np.random.default_rng(0)
    side = lambda: {"tokens": jnp.asarray(rng.integers(0, 9, (400, 3))), "mask": jnp.asarray(rng.random((400, 3)) < 0.5)}  # noqa: E731
    pairs = {
        "chosen": side(),
        "rejected": side(),
        "ref_chosen_logps": jnp.arange(400.0),
        "ref_rejected_logps": -1 - jnp.arange(400.0),
    }
    found = lab.shuffled(pairs, jax.random.key(0))
    swapped = np.asarray(found["ref_chosen_logps"] < 0)
    assert 0.4 < swapped.mean() < 0.6
    for name in ("tokens", "mask"):
        a, b = (np.asarray(pairs[s][name]) for s in ("chosen", "rejected"))
        np.testing.assert_array_equal(found["chosen"][name], np.where(swapped[:, None], b, a))
        np.testing.assert_array_equal(found["rejected"][name], np.where(swapped[:, None], a, b))
    np.testing.assert_array_equal(np.asarray(found["ref_rejected_logps"]) < 0, ~swapped)


def test_copies_repeat_their_pattern_and_only_repeats_are_trained():
    world = pref.make(jax.random.key(0), length=12)
    record = jax.device_get(skills.copies(world, jax.random.key(1), 20))
    assert (record["tokens"][:, 0] == world.end).all() and record["targets"].shape == (20, 12)
    assert (record["targets"][:, 3:] == record["targets"][:, :-3]).all()
    assert (record["mask"] == (np.arange(12) >= 3)).all() and len(np.unique(record["targets"][:, :3], axis=0)) > 15
    mixed = skills.text(world, jax.random.key(2), 7)
    assert (mixed["tokens"][:, 0] == jnp.asarray([world.begin] * 3 + [world.end] * 4)).all()
