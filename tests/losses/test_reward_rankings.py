"""Margins, rankings, outcomes, steps and ensembles, re-derived in numpy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.losses import reward
from tests.losses import bigram

RNG = np.random.default_rng(0)
SCORES = RNG.normal(0, 2, (5, 4)).astype(np.float32)
VALID = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)


def log_loss(gap):
    return np.log1p(np.exp(-np.asarray(gap, np.float64)))


def test_the_margin_shifts_the_likelihood():
    chosen, rejected, margin = (RNG.normal(size=6).astype(np.float32) for _ in range(3))
    got = reward.bradley_terry(chosen, rejected, margin)
    np.testing.assert_allclose(got, log_loss(chosen - rejected - margin), rtol=1e-5)
    np.testing.assert_array_equal(reward.bradley_terry(chosen, rejected, 0.0), reward.bradley_terry(chosen, rejected))


def test_kwise_is_the_mean_over_all_pairs_of_a_ranking():
    for valid in (None, VALID):
        there = np.ones((5, 4), bool) if valid is None else valid
        expected = []
        for row, real in zip(SCORES, there, strict=True):
            pairs = [log_loss(row[i] - row[j]) for i, j in itertools.combinations(np.flatnonzero(real), 2)]
            expected.append(np.mean(pairs) if pairs else 0.0)
        np.testing.assert_allclose(reward.kwise(SCORES, valid), expected, rtol=1e-5)


def test_plackett_luce_is_the_product_of_choices():
    for valid in (None, VALID):
        there = np.ones((5, 4), bool) if valid is None else valid
        expected = []
        for row, real in zip(SCORES.astype(np.float64), there, strict=True):
            left, nll = list(row[real]), 0.0
            while left:
                nll -= np.log(np.exp(left[0]) / np.exp(left).sum())
                left.pop(0)
            expected.append(nll)
        np.testing.assert_allclose(reward.plackett_luce(SCORES, valid), expected, rtol=1e-4, atol=1e-6)
    orders = np.array(list(itertools.permutations(SCORES[0, :3])))
    np.testing.assert_allclose(np.exp(-np.asarray(reward.plackett_luce(orders))).sum(), 1, rtol=1e-5)  # a distribution


def test_rankings_of_two_are_pairs_and_equal_scores_are_chance():
    two = reward.bradley_terry(SCORES[:, 0], SCORES[:, 1])
    np.testing.assert_allclose(reward.kwise(SCORES[:, :2]), two, rtol=1e-5)
    np.testing.assert_allclose(reward.plackett_luce(SCORES[:, :2]), two, rtol=1e-5)
    same = jnp.full((1, 4), 3.0)
    np.testing.assert_allclose(reward.kwise(same), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(reward.plackett_luce(same), np.log(24), rtol=1e-6)


@pytest.mark.parametrize("fn", [reward.kwise, reward.plackett_luce])
def test_gradients_are_finite_at_extremes_and_zero_where_nothing_is(fn):
    wild = jnp.asarray([[1e4, -1e4, 0.0, 5e3], [0, 0, 0, 0], [1e4, 1e4, -1e4, 0], [3.0, 1e4, 0, 0], [1e4, 0, 0, 0]])
    value, slope = jax.value_and_grad(lambda s: fn(s, jnp.asarray(VALID)).sum())(wild)
    assert np.isfinite(value) and np.isfinite(slope).all()
    np.testing.assert_array_equal(slope[~VALID], 0)
    np.testing.assert_array_equal(slope[3], 0)  # one completion has nothing to be compared with
    # only differences matter; float32 keeps three digits behind the point of 1e4
    np.testing.assert_allclose(np.asarray(slope).sum(axis=1), 0, atol=1e-3)


def test_the_binary_loss_and_its_gradient():
    logits = jnp.array([-1e4, -2.0, 0.0, 3.0, 1e4])
    for label in (0.0, 1.0, 0.3):
        value, slope = jax.vmap(jax.value_and_grad(reward.binary))(logits, jnp.full(5, label))
        p = 1 / (1 + np.exp(-np.asarray(logits, np.float64).clip(-30, 30)))
        np.testing.assert_allclose(value[1:4], -(label * np.log(p) + (1 - label) * np.log(1 - p))[1:4], rtol=1e-5)
        np.testing.assert_allclose(slope, p - label, atol=1e-6)
        assert np.isfinite(value).all()


def table_scalars(params, r):
    return params[r["tokens"]]


def last_of(table, r):
    n = (r["segments"] != 0).sum(-1)
    return np.asarray(table)[np.take_along_axis(r["targets"], (n - 1)[..., None], axis=-1)[..., 0]]


def ranked_batch():
    rows = [bigram.record(5, 6, seed=i) for i in range(4)]
    return {"ranked": {k: np.stack([r[k] for r in rows], axis=1) for k in rows[0]}, "valid": VALID}


def test_the_ranked_builder_equals_numpy():
    table, batch = jnp.asarray(RNG.normal(size=bigram.V).astype(np.float32)), ranked_batch()
    scores = last_of(table, batch["ranked"])
    mean, metrics = reward.ranked_loss(table_scalars, center=0.1)({"reward": table}, batch, None)
    average = np.array([s[v].mean() if v.any() else 0 for s, v in zip(scores, VALID, strict=True)])
    each = np.asarray(reward.kwise(scores, VALID)) + 0.4 * average**2
    np.testing.assert_allclose(mean.value(), each[:3].mean(), rtol=1e-5)
    assert mean.count == 3 and metrics["accuracy"].count == 6 + 3 + 1
    gaps = [s[i] - s[j] for s, v in zip(scores, VALID, strict=True) for i, j in itertools.combinations(np.flatnonzero(v), 2)]
    np.testing.assert_allclose(metrics["margin"].value(), np.mean(gaps), rtol=1e-4)
    np.testing.assert_allclose(metrics["accuracy"].value(), np.mean([0.5 * (1 + np.sign(g)) for g in gaps]), rtol=1e-6)
    other, _ = reward.ranked_loss(table_scalars, reward.plackett_luce)({"reward": table}, batch, None)
    np.testing.assert_allclose(other.value(), np.asarray(reward.plackett_luce(scores, VALID))[:3].mean(), rtol=1e-5)


def test_rankings_of_two_train_like_pairs():
    table = jnp.asarray(RNG.normal(size=bigram.V).astype(np.float32))
    sides = [bigram.record(4, 6, seed=i) for i in (1, 2)]
    pairs = {"chosen": sides[0], "rejected": sides[1]}
    ranked = {"ranked": {k: np.stack([s[k] for s in sides], axis=1) for k in sides[0]}, "valid": np.ones((4, 2), bool)}
    one, two = reward.loss(table_scalars, center=0.01), reward.ranked_loss(table_scalars, center=0.01)
    a, b = (jax.grad(lambda p, f=f, x=x: f({"reward": p}, x, None)[0].value())(table) for f, x in ((one, pairs), (two, ranked)))
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert np.abs(a).max() > 0.01
    got, same = one({"reward": table}, pairs, None)[1], two({"reward": table}, ranked, None)[1]
    for name in got:
        np.testing.assert_allclose(got[name].value(), same[name].value(), rtol=1e-5, atol=1e-6)


def test_the_margin_column_reaches_the_pair_builder():
    table = jnp.asarray(RNG.normal(size=bigram.V).astype(np.float32))
    chosen, rejected = bigram.record(4, 6, seed=1), bigram.record(4, 6, seed=2)
    margin = np.array([0.0, 0.5, 1.0, 2.0], np.float32)
    batch = {"chosen": chosen, "rejected": rejected, "margin": margin}
    mean, _ = reward.loss(table_scalars)({"reward": table}, batch, None)
    gap = last_of(table, chosen) - last_of(table, rejected)
    np.testing.assert_allclose(mean.value(), log_loss(gap - margin).mean(), rtol=1e-5)


def test_outcome_reward_reads_the_last_token():
    table = jnp.asarray(RNG.normal(size=bigram.V).astype(np.float32))
    record, label = bigram.record(6, 6, seed=3), np.array([1, 0, 1, 1, 0, 0], bool)
    mean, metrics = reward.outcome_loss(table_scalars)({"reward": table}, {"record": record, "label": label}, None)
    s = last_of(table, record)
    np.testing.assert_allclose(mean.value(), np.where(label, log_loss(s), log_loss(-s)).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"].value(), ((s > 0) == label).mean(), rtol=1e-6)
    assert metrics["positive"].value() == 0.5


def test_process_reward_weighs_steps_alike_and_ignores_the_rest():
    table = jnp.asarray(RNG.normal(size=bigram.V).astype(np.float32))
    record = bigram.record(3, 6, seed=4)
    ends, labels = RNG.random((3, 6)) < 0.5, RNG.random((3, 6)) < 0.5
    s = np.asarray(table)[record["tokens"]]
    batch = {"record": record, "step_ends": ends, "step_labels": labels}
    mean, _ = reward.process_loss(table_scalars)({"reward": table}, batch, None)
    np.testing.assert_allclose(mean.value(), np.where(labels, log_loss(s), log_loss(-s))[ends].mean(), rtol=1e-5)
    assert mean.count == ends.sum()
    turned = {**batch, "step_labels": labels ^ ~ends}
    assert reward.process_loss(table_scalars)({"reward": table}, turned, None)[0].value() == mean.value()


def test_a_solution_from_its_steps():
    logits, ends = jnp.array([[0.0, 5.0, -1.0], [2.0, 2.0, 2.0]]), jnp.array([[True, False, True], [False, False, True]])
    p = reward.step_logps(logits, ends)
    right = 1 / (1 + np.exp(-np.array([0.0, -1.0, 2.0])))
    np.testing.assert_allclose(np.exp(reward.weakest_step(p)), [right[1], right[2]], rtol=1e-6)
    np.testing.assert_allclose(np.exp(reward.all_steps(p)), [right[0] * right[1], right[2]], rtol=1e-6)


def test_an_ensemble_is_its_members():
    tables = jnp.asarray(RNG.normal(size=(3, bigram.V)).astype(np.float32))
    record = bigram.record(4, 6, seed=5)
    got = reward.ensemble(lambda p, r: reward.score(table_scalars, p, r), tables, record)
    np.testing.assert_allclose(got, [last_of(t, record) for t in tables], rtol=1e-6)
    np.testing.assert_allclose(reward.ensemble_mean(got), np.mean(got, axis=0), rtol=1e-6)
    np.testing.assert_array_equal(reward.worst_case(got), np.min(got, axis=0))
    lower = np.mean(got, axis=0) - 0.5 * np.var(got, axis=0)
    np.testing.assert_allclose(reward.variance_penalised(got, weight=0.5), lower, rtol=1e-5)
    np.testing.assert_allclose(reward.variance_penalised(got, weight=0.0), reward.ensemble_mean(got), rtol=1e-6)
    alike = jnp.tile(got[:1], (3, 1))
    for combined in (reward.ensemble_mean(alike), reward.worst_case(alike), reward.variance_penalised(alike, weight=9.0)):
        np.testing.assert_allclose(combined, got[0], rtol=1e-5)
