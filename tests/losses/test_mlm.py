"""Masked-language modelling against numpy, with a model whose scores are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.types import Head, Model, Output
from jaxllm.losses import mlm

V, D, MASK = 7, 4, 6
RNG = np.random.default_rng(0)
PARAMS = {"policy": {"table": RNG.normal(size=(V, D)).astype(np.float32), "kernel": RNG.normal(size=(D, V)).astype(np.float32)}}
NSP = RNG.normal(size=(3, 2)).astype(np.float32)
BATCH = {
    "tokens": RNG.integers(0, 6, (3, 5)).astype(np.int32),
    "segments": np.array([[1, 1, 1, 2, 2], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]], np.int32),
    "chosen": np.array([[1, 0, 0, 1, 0], [0, 1, 1, 0, 0], [0] * 5], bool),
    "is_next": np.array([1, 0, 1], np.int32),
}
BATCH["inputs"] = np.where(BATCH["chosen"], MASK, BATCH["tokens"])


def static(key, batch):
    return batch["inputs"], batch["chosen"]


def apply(params, tokens, *, segments, types=None, rng=None):
    return Output(jnp.asarray(params["table"])[tokens], None, {"next_sentence": jnp.asarray(NSP)})


MODEL = Model(None, None, apply, lambda params: Head(params["kernel"], vocab_size=V), None)


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def by_hand():
    """(sum of -log p over the chosen tokens, how many were the likeliest)."""
    p = PARAMS["policy"]
    total = right = 0.0
    for row, at in zip(*np.nonzero(BATCH["chosen"]), strict=True):
        scores = log_softmax(p["table"][BATCH["inputs"][row, at]] @ p["kernel"])
        total -= scores[BATCH["tokens"][row, at]]
        right += scores.argmax() == BATCH["tokens"][row, at]
    return total, right


def test_the_loss_is_on_the_chosen_tokens_only():
    mean, metrics = mlm.loss(MODEL, static)(PARAMS, BATCH, None)
    total, right = by_hand()
    assert mean.count == 4
    np.testing.assert_allclose(mean.total, total, rtol=1e-5)
    np.testing.assert_allclose(metrics["mean_token_accuracy"].total, right)
    assert metrics["mask_rate"].value() == pytest.approx(4 / 8)


def test_the_model_sees_the_corrupted_tokens_and_predicts_the_original_ones():
    seen = []

    def corrupt(key, batch):
        seen.append(key)
        return jnp.full_like(batch["tokens"], MASK), batch["segments"] != 0

    mean, _ = mlm.loss(MODEL, corrupt)(PARAMS, BATCH, jax.random.key(3))
    p = PARAMS["policy"]
    scores = log_softmax(p["table"][MASK] @ p["kernel"])
    expected = -scores[BATCH["tokens"]][BATCH["segments"] != 0].sum()
    np.testing.assert_allclose(mean.total, expected, rtol=1e-5)
    assert seen == [jax.random.key(3)]


def test_nothing_chosen_is_a_loss_of_zero():
    batch = {**BATCH, "chosen": np.zeros((3, 5), bool)}
    mean, grads = jax.value_and_grad(lambda p: mlm.loss(MODEL, static)(p, batch, None)[0].value())(PARAMS)
    assert mean == 0 and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_next_sentence_adds_its_own_mean():
    mean, metrics = mlm.with_next_sentence(MODEL, static)(PARAMS, BATCH, None)
    total, _ = by_hand()
    labels = 1 - BATCH["is_next"]  # column 0 says next, as BERT's
    nsp = -log_softmax(NSP)[np.arange(3), labels].mean()
    np.testing.assert_allclose(mean.value(), total / 4 + nsp, rtol=1e-5)
    np.testing.assert_allclose(metrics["nsp_loss"].value(), nsp, rtol=1e-5)
    np.testing.assert_allclose(metrics["mlm_loss"].value(), total / 4, rtol=1e-5)
    assert metrics["nsp_accuracy"].total == (NSP.argmax(1) == labels).sum()
    assert mean.count == 3
