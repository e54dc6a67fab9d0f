"""group_loss and PPO-ptx on a bigram model against numpy; what is masked, excluded, empty or out of the nucleus."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.losses import policy
from tests.losses import bigram
from tests.models.tiny import fast_jit

B, L = 4, 8
RNG = np.random.default_rng(2)
PARAMS = {"policy": bigram.params(0)}
CLIPPED = partial(policy.clipped, low=0.2, high=0.28)


def graded(loss_fn, batch):
    """(loss, metrics, gradients)."""

    def fn(params):
        mean, metrics = loss_fn(params, batch, None)
        return mean.value(), metrics

    (value, metrics), grads = fast_jit(jax.value_and_grad(fn, has_aux=True))(PARAMS)
    return value, metrics, grads


def group_batch(seed=0, normalise=policy.sequence_mean):
    record = bigram.record(B, L, seed=seed, prompt=2)
    old = bigram.logps(bigram.params(1), record).astype(np.float32)
    ref = bigram.logps(bigram.params(2), record).astype(np.float32)
    advantages = np.random.default_rng(seed).normal(size=B).astype(np.float32)
    return record | {
        "logps_old": old, "ref_logps": ref, "advantages": advantages, "weights": np.asarray(normalise(record["mask"]))
    }  # fmt: skip


def test_equals_numpy_and_has_the_names_of_trl():
    batch = group_batch()
    mask, a = batch["mask"], batch["advantages"][:, None].astype(np.float64)
    batch["importance"] = RNG.uniform(0.5, 1.5, mask.shape).astype(np.float32)
    loss_fn = policy.group_loss(bigram.MODEL, CLIPPED, kl=policy.k3, kl_coef=0.1)
    mean, metrics = fast_jit(loss_fn)(PARAMS, batch, None)
    logps = bigram.logps(PARAMS["policy"], batch)
    rho, x = np.exp(logps - batch["logps_old"]), batch["ref_logps"] - logps
    k3 = np.exp(x) - x - 1
    tokens = -np.minimum(rho * a, np.clip(rho, 0.8, 1.28) * a) * batch["importance"] + 0.1 * k3
    loss = np.mean([t[m].mean() for t, m in zip(tokens, mask, strict=True)])
    assert mean.count == B
    np.testing.assert_allclose(mean.value(), loss, rtol=1e-4)
    table = bigram.table(PARAMS["policy"])
    low, high = (rho < 0.8) & (a < 0), (rho > 1.28) & (a > 0)
    expected = {
        "kl": k3, "entropy": -(np.exp(table) * table).sum(-1)[batch["tokens"]], "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high, "clip_ratio/region_mean": low | high, "val/ratio": rho,
        "policy/approxkl_avg": 0.5 * (logps - batch["logps_old"]) ** 2,
        "sampling/importance_sampling_ratio/mean": batch["importance"],
    }  # fmt: skip
    assert low[mask].any() and high[mask].any(), "the batch does not clip"
    assert set(metrics) == {*expected, "loss", "completions/empty"}
    for name, values in expected.items():
        np.testing.assert_allclose(metrics[name].value(), values[mask].mean(), rtol=1e-4, atol=1e-5, err_msg=name)
    assert metrics["completions/empty"].total == 0


@pytest.mark.parametrize("token_loss", [CLIPPED, partial(policy.gspo, low=0.1, high=0.1), partial(policy.cispo, cap=2.0)])
def test_what_is_outside_the_mask_changes_nothing(token_loss):
    batch = group_batch()
    quiet = {k: np.where(batch["mask"], v, 0) if k in ("logps_old", "ref_logps") else v for k, v in batch.items()}
    loud = {**batch, **{k: np.where(batch["mask"], batch[k], -1e30).astype(np.float32) for k in ("logps_old", "ref_logps")}}
    loud["weights"] = np.where(batch["mask"], batch["weights"], np.nan).astype(np.float32)
    loss_fn = policy.group_loss(bigram.MODEL, token_loss, kl=policy.k2, kl_coef=0.1)
    grad = fast_jit(jax.value_and_grad(lambda p, b: loss_fn(p, b, None)[0].value()))
    one, two = grad(PARAMS, quiet), grad(PARAMS, loud)
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_a_masked_row_equals_a_dropped_row():
    """Under token_mean; under the other two it stays in the number of rows, as in TRL."""
    batch = group_batch()
    loss_fn = policy.group_loss(bigram.MODEL, CLIPPED)

    def value(keep, normalise, drop):
        mask = batch["mask"] & keep[:, None]
        out = {**batch, "mask": mask, "weights": np.asarray(normalise(mask))}
        if drop:
            out = {k: v[keep] for k, v in out.items()}
            out["weights"] = np.asarray(normalise(out["mask"]))
        return float(fast_jit(loss_fn)(PARAMS, out, None)[0].value())

    keep = np.array([True, False, True, True])
    assert value(keep, policy.token_mean, True) == pytest.approx(value(keep, policy.token_mean, False), rel=1e-5)
    for normalise in (policy.sequence_mean, policy.constant(L)):
        assert value(keep, normalise, True) * 3 / 4 == pytest.approx(value(keep, normalise, False), rel=1e-5)


@pytest.mark.parametrize("normalise", [policy.sequence_mean, policy.token_mean, policy.constant(6)])
def test_a_batch_of_truncated_rows_alone_is_nothing_and_is_counted(normalise):
    batch = group_batch()
    mask = policy.without_truncated(batch["mask"], np.zeros(B, bool))
    batch |= {"mask": mask, "weights": normalise(mask)}
    for token_loss in (CLIPPED, policy.reinforce, partial(policy.gspo, low=0.1, high=0.1)):
        loss_fn = policy.group_loss(bigram.MODEL, token_loss, kl=policy.k3, kl_coef=0.1)
        value, metrics, grads = graded(loss_fn, batch)
        assert value == 0 and not any(np.any(g) for g in jax.tree.leaves(grads))
        assert all(np.isfinite(m.value()) for m in metrics.values())
        assert metrics["completions/empty"].total == B


def test_zero_advantages_give_a_zero_gradient():
    batch = group_batch() | {"advantages": np.asarray(policy.grpo(jnp.full(B, 0.1), B))}
    loss_fn = policy.group_loss(bigram.MODEL, CLIPPED)
    _, metrics, grads = graded(loss_fn, batch)
    assert not any(np.any(g) for g in jax.tree.leaves(grads))
    assert metrics["clip_ratio/region_mean"].value() == 0


def test_token_advantages_equal_row_advantages_that_are_repeated():
    batch = group_batch()
    each = {**batch, "advantages": np.repeat(batch["advantages"][:, None], L, 1)}
    loss_fn = fast_jit(policy.group_loss(bigram.MODEL, CLIPPED))
    assert loss_fn(PARAMS, batch, None)[0] == loss_fn(PARAMS, each, None)[0]


def test_a_token_outside_the_nucleus_stays_finite():
    """After an update the sampled token may have left the top-p set: probability 0, no gradient, and finite metrics."""
    batch = group_batch()
    gone = lambda logits: jnp.where(jnp.arange(bigram.V) < 2, logits, -jnp.inf)  # noqa: E731
    for kl in (None, policy.k2, policy.k3):
        loss_fn = policy.group_loss(bigram.MODEL, CLIPPED, kl=kl, kl_coef=0.1, transform=gone)
        value, metrics, grads = graded(loss_fn, batch)
        assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
        assert all(np.isfinite(m.value()) for m in metrics.values())


def test_temperature_and_transform_are_those_of_the_sampler():
    batch = group_batch()
    two = lambda logits: jnp.where(logits >= jax.lax.top_k(logits, 2)[0][..., 1:], logits, -jnp.inf)  # noqa: E731
    logits = np.asarray(PARAMS["policy"]["embed"], np.float64) @ np.asarray(PARAMS["policy"]["kernel"], np.float64) / 0.7
    best = np.argsort(-logits, axis=1)[:, :2]
    batch["targets"] = best[batch["tokens"], RNG.integers(0, 2, batch["tokens"].shape)].astype(np.int32)
    top = np.take_along_axis(logits, best, 1)
    mine = logits[batch["tokens"], batch["targets"]] - np.log(np.exp(top).sum(1))[batch["tokens"]]
    batch["logps_old"] = mine.astype(np.float32)
    _, metrics = policy.group_loss(bigram.MODEL, CLIPPED, temperature=0.7, transform=two)(PARAMS, batch, None)
    assert abs(metrics["val/ratio"].value() - 1) < 1e-5
    _, metrics = policy.group_loss(bigram.MODEL, CLIPPED, temperature=0.7)(PARAMS, batch, None)
    assert abs(metrics["val/ratio"].value() - 1) > 0.05


def test_ptx_adds_the_mean_nll_of_pretraining_text_under_the_losss_own_denominator():
    batch, text = group_batch(normalise=policy.token_mean), bigram.record(B, L, seed=9, prompt=0)
    nll = -bigram.logps(PARAMS["policy"], text)[text["mask"]].mean()
    plain = policy.group_loss(bigram.MODEL, CLIPPED)
    both = policy.with_ptx(plain, bigram.MODEL, ptx_coef=0.3)
    ptx = text | {"weights": np.asarray(policy.token_mean(text["mask"]))}
    mean, metrics = fast_jit(both)(PARAMS, {**batch, "ptx": ptx}, None)
    np.testing.assert_allclose(mean.value(), plain(PARAMS, batch, None)[0].value() + 0.3 * nll, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss/ptx_avg"].value(), nll, rtol=1e-5)
    assert metrics["loss"] == mean


def test_ptx_beside_ppo():
    value = jnp.asarray(RNG.normal(size=bigram.V).astype(np.float32))
    params = PARAMS | {"value": value}
    batch, text = group_batch(), bigram.record(B, L, seed=9, prompt=0)
    batch |= {n: RNG.normal(size=(B, L)).astype(np.float32) for n in ("values_old", "returns", "advantages")}
    plain = policy.loss(bigram.MODEL, lambda p, r: p[r["tokens"]], clip=0.2, value_clip=0.2, value_coef=0.5)
    both = policy.with_ptx(plain, bigram.MODEL, ptx_coef=2.0)
    ptx = text | {"weights": np.asarray(policy.spread(text["mask"], batch["mask"].sum()))}
    nll = -bigram.logps(PARAMS["policy"], text)[text["mask"]].mean()
    got = both(params, {**batch, "ptx": ptx}, None)[0].value()
    np.testing.assert_allclose(got, plain(params, batch, None)[0].value() + 2 * nll, rtol=1e-4)
