"""The builders on pairs: metrics, masks, bad pairs, micro-batches, and the losses on tokens against numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.losses import preference
from jaxllm.losses.preference import table
from tests.losses import bigram
from tests.losses.preference.derived import logistic

PARAMS, REFERENCE = bigram.params(0), bigram.params(1)
CHOSEN, REJECTED = bigram.record(4, 6, seed=1), bigram.record(4, 6, seed=2)
LENGTHS = [side["mask"].sum(1) for side in (CHOSEN, REJECTED)]
STATISTICS = ("aot", "aot_unpaired")  # of the batch


def sums(params, record, weights=1.0):
    return (bigram.logps(params, record) * record["mask"] * weights).sum(1)


def batch(chosen=CHOSEN, rejected=REJECTED, rows=slice(None), **more):
    columns = {
        "chosen": chosen, "rejected": rejected,
        "ref_chosen_logps": sums(REFERENCE, chosen).astype(np.float32),
        "ref_rejected_logps": sums(REFERENCE, rejected).astype(np.float32),
    }  # fmt: skip
    return jax.tree.map(lambda x: x[rows], columns | more)


def with_tokens(columns):
    """The reference's log-probabilities per token."""
    tokens = lambda side: np.asarray(preference.token_logps(bigram.MODEL, REFERENCE, columns[side]))  # noqa: E731
    return columns | {f"ref_{side}_logps": tokens(side) for side in ("chosen", "rejected")}


def gradient(loss_fn, columns):
    return jax.grad(lambda p: loss_fn({"policy": p}, columns, None)[0].total)(PARAMS)


def largest(tree):
    return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))


BUILT = {e.name: preference.loss(bigram.MODEL, e.fn, **{"beta": 0.1, **e.hyper}) for e in table.PAIRS + table.FREE} | {
    "ld_dpo": preference.ld_dpo(bigram.MODEL, beta=0.3, alpha=0.5),
    "wpo": preference.wpo(bigram.MODEL, preference.dpo, beta=0.3),
    "token_unlikelihood": preference.token_unlikelihood(bigram.MODEL, alpha=0.5),
    "rpo": preference.loss(bigram.MODEL, preference.dpo, beta=0.3, nll_weight=1.0),
}


def columns_for(name, columns):
    return with_tokens(columns) if name == "ld_dpo" else columns


def test_the_builder_equals_numpy_and_has_the_names_of_trl():
    loss_fn = preference.loss(bigram.MODEL, preference.dpo, beta=0.4, nll_weight=0.5, chunk=7)
    mean, metrics = jax.jit(loss_fn)({"policy": PARAMS}, batch(), jax.random.key(0))
    chosen, rejected = sums(PARAMS, CHOSEN), sums(PARAMS, REJECTED)
    rewards = [0.4 * (s - sums(REFERENCE, r)) for s, r in ((chosen, CHOSEN), (rejected, REJECTED))]
    nll = -chosen / LENGTHS[0]
    expected = {
        "loss": (logistic(rewards[0] - rewards[1]) + 0.5 * nll).mean(),
        "rewards/chosen": rewards[0].mean(), "rewards/rejected": rewards[1].mean(),
        "rewards/margins": (rewards[0] - rewards[1]).mean(),
        "rewards/accuracies": (rewards[0] > rewards[1]).mean(),
        "logps/chosen": chosen.mean(), "logps/rejected": rejected.mean(), "nll_loss": nll.mean(),
        "pairs/identical": 0, "pairs/empty": 0,
    }  # fmt: skip
    assert set(metrics) == set(expected) and mean.count == 4
    np.testing.assert_allclose(mean.value(), expected["loss"], rtol=1e-4)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name].value(), value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_only_completion_tokens_count():
    """Prompt targets and padding change nothing: masked equals dropped."""
    got = preference.pair_logps(bigram.MODEL, PARAMS, batch())
    np.testing.assert_allclose(got.chosen, sums(PARAMS, CHOSEN), rtol=1e-5)
    np.testing.assert_array_equal(got.chosen_length, LENGTHS[0])
    outside = ~CHOSEN["mask"]
    changed = batch(chosen={**CHOSEN, "targets": np.where(outside, 3, CHOSEN["targets"])})
    np.testing.assert_array_equal(preference.pair_logps(bigram.MODEL, PARAMS, changed).chosen, got.chosen)


@pytest.mark.parametrize("name", ["ipo", "simpo", "orpo", "ld_dpo", "wpo", "token_unlikelihood"])
def test_masked_targets_change_no_loss(name):
    changed = batch(rejected={**REJECTED, "targets": np.where(~REJECTED["mask"], 3, REJECTED["targets"])})
    values = [float(BUILT[name]({"policy": PARAMS}, columns_for(name, c), None)[0].value()) for c in (batch(), changed)]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_hyper_parameters_may_be_traced():
    """A sweep calls the builder inside a vmapped function."""
    at = lambda beta: preference.loss(bigram.MODEL, preference.dpo, beta=beta)({"policy": PARAMS}, batch(), None)[0].value()  # noqa: E731
    betas = jnp.array([0.0, 0.3])
    np.testing.assert_allclose(jax.jit(jax.vmap(at))(betas), [np.log(2), float(at(0.3))], rtol=1e-5)


@pytest.mark.parametrize("entry", table.PAIRS + table.FREE, ids=lambda e: e.name)
def test_every_setting_may_be_traced(entry):
    def at(hyper):
        return preference.loss(bigram.MODEL, entry.fn, **{"beta": 0.1, **hyper})({"policy": PARAMS}, batch(), None)[0].value()

    traced = jax.vmap(at)(jax.tree.map(lambda x: jnp.array([x, x / 2]), entry.hyper)) if entry.hyper else [at({})]
    np.testing.assert_allclose(traced[0], at(entry.hyper), rtol=1e-5)


@pytest.mark.parametrize("name", list(BUILT))
def test_identical_pairs_teach_nothing_and_are_counted(name):
    same = batch(rejected=CHOSEN)
    mean, metrics = BUILT[name]({"policy": PARAMS}, columns_for(name, same), None)
    assert metrics["pairs/identical"].total == 4 and np.isfinite(mean.value())
    assert largest(gradient(BUILT[name], columns_for(name, same))) == 0
    assert largest(gradient(BUILT[name], columns_for(name, batch()))) > 1e-4


@pytest.mark.parametrize("name", [n for n in BUILT if n not in STATISTICS])
def test_one_identical_pair_does_not_touch_the_others(name):
    mixed = {k: np.concatenate([REJECTED[k][:2], CHOSEN[k][2:]]) for k in REJECTED}
    whole = columns_for(name, batch(rejected=mixed))
    got, expected = (gradient(BUILT[name], c) for c in (whole, jax.tree.map(lambda x: x[:2], whole)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, expected)


@pytest.mark.parametrize("name", list(BUILT))
def test_empty_completions_are_finite_and_counted(name):
    empty = {**CHOSEN, "mask": CHOSEN["mask"] & (np.arange(4) > 1)[:, None]}
    for columns, count in ((batch(chosen=empty), 2), (batch(rejected={**REJECTED, "mask": np.zeros_like(REJECTED["mask"])}), 4)):
        mean, metrics = BUILT[name]({"policy": PARAMS}, columns_for(name, columns), None)
        grads = gradient(BUILT[name], columns_for(name, columns))
        assert metrics["pairs/empty"].total == count and np.isfinite(mean.value())
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


def test_a_batch_of_empty_completions_teaches_nothing():
    none = lambda side: {**side, "mask": np.zeros_like(side["mask"])}  # noqa: E731
    for name, loss_fn in BUILT.items():
        columns = columns_for(name, batch(chosen=none(CHOSEN), rejected=none(REJECTED)))
        assert largest(gradient(loss_fn, columns)) == 0, name


@pytest.mark.parametrize("name", [n for n in BUILT if n not in STATISTICS])
def test_micro_batches_add_up_to_the_batch(name):
    columns = columns_for(name, batch())
    parts = [jax.tree.map(lambda x, r=rows: x[r], columns) for rows in (slice(0, 1), slice(1, 4))]
    whole, *split = (BUILT[name]({"policy": PARAMS}, c, None)[0] for c in (columns, *parts))
    np.testing.assert_allclose((split[0] + split[1]).value(), whole.value(), rtol=1e-5)


def test_a_token_mean_of_the_nll_is_a_column():
    """ORPO's NLL: the mean over the batch's tokens, prompt included, is the same in micro-batches."""
    loss_fn = preference.loss(bigram.MODEL, preference.orpo, beta=0.1, nll_weight=1.0)
    real = CHOSEN["segments"] > 0
    columns = batch(nll_weights=np.asarray(preference.token_mean(jnp.asarray(real))))
    mean, metrics = loss_fn({"policy": PARAMS}, columns, None)
    expected = -(bigram.logps(PARAMS, CHOSEN) * real).sum() / real.sum()
    np.testing.assert_allclose(metrics["nll_loss"].value(), expected, rtol=1e-5)
    parts = [loss_fn({"policy": PARAMS}, jax.tree.map(lambda x, r=r: x[r], columns), None)[0] for r in (slice(0, 1), slice(1, 4))]
    np.testing.assert_allclose((parts[0] + parts[1]).value(), mean.value(), rtol=1e-5)
    ratio_alone = preference.loss(bigram.MODEL, preference.orpo, beta=0.1)({"policy": PARAMS}, columns, None)[0].value()
    np.testing.assert_allclose(mean.value() - ratio_alone, expected, rtol=1e-4)


def test_ld_dpo_weighs_the_longer_tail():
    alpha, shared = 0.4, np.minimum(*LENGTHS)[:, None]
    weight = lambda side: np.where(np.cumsum(side["mask"], 1) <= shared, 1.0, alpha)  # noqa: E731
    w, l = (sums(PARAMS, s, weight(s)) - sums(REFERENCE, s, weight(s)) for s in (CHOSEN, REJECTED))  # noqa: E741
    at = lambda a: preference.ld_dpo(bigram.MODEL, beta=0.3, alpha=a)({"policy": PARAMS}, with_tokens(batch()), None)[0].value()  # noqa: E731
    assert (LENGTHS[0] != LENGTHS[1]).any()
    np.testing.assert_allclose(at(alpha), logistic(0.3 * (w - l)).mean(), rtol=1e-4)
    plain = preference.loss(bigram.MODEL, preference.dpo, beta=0.3)({"policy": PARAMS}, batch(), None)[0].value()
    np.testing.assert_allclose(at(1.0), plain, rtol=1e-5)


def alignment(params, side):
    squares = np.log((np.exp(bigram.table(params)) ** 2).sum(-1))[side["tokens"]]
    return np.exp(((bigram.logps(params, side) - squares) * side["mask"]).sum(1) / side["mask"].sum(1))


def test_wpo_weighs_pairs_by_how_likely_they_are():
    value = BUILT["wpo"]({"policy": PARAMS}, batch(), None)[0].value()
    pairs = preference.pair_logps(bigram.MODEL, PARAMS, batch())
    weights = alignment(PARAMS, CHOSEN) * alignment(PARAMS, REJECTED)
    losses = np.asarray(preference.dpo(pairs, beta=0.3))
    np.testing.assert_allclose(value, (losses * weights).mean(), rtol=1e-4)

    def by_hand(params):
        logps = preference.pair_logps(bigram.MODEL, params, batch())
        return (preference.dpo(logps, beta=0.3) * jnp.asarray(weights, jnp.float32)).sum()

    grads = gradient(BUILT["wpo"], batch()), jax.grad(by_hand)(PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), *grads)


def test_token_unlikelihood_is_over_tokens():
    p = np.exp(bigram.logps(PARAMS, REJECTED))
    unlikely = -(np.log(1 - p) * REJECTED["mask"]).sum(1) / LENGTHS[1]
    expected = (-sums(PARAMS, CHOSEN) / LENGTHS[0] + 0.5 * unlikely).mean()
    np.testing.assert_allclose(BUILT["token_unlikelihood"]({"policy": PARAMS}, batch(), None)[0].value(), expected, rtol=1e-4)


def test_a_combination_can_be_built():
    fn = preference.combined((preference.dpo, 0.5), (partial(preference.cdpo, label_smoothing=0.1), 0.5))
    value = preference.loss(bigram.MODEL, fn, beta=0.3)({"policy": PARAMS}, batch(), None)[0].value()
    pairs = preference.pair_logps(bigram.MODEL, PARAMS, batch())
    expected = 0.5 * preference.dpo(pairs, beta=0.3) + 0.5 * preference.cdpo(pairs, beta=0.3, label_smoothing=0.1)
    np.testing.assert_allclose(value, expected.mean(), rtol=1e-5)
