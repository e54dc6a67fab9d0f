"""Classification losses against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.losses import classify

RNG = np.random.default_rng(0)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def run(kind, scores, batch):
    """(mean loss, accuracy, count) of scores that are given."""
    loss_fn = classify.loss(lambda params, batch: params, classify.KINDS[kind])
    mean, metrics = loss_fn({"classifier": jnp.asarray(scores)}, batch, None)
    assert set(metrics) == {"loss", "accuracy"} and metrics["accuracy"].count == mean.count
    return float(mean.value()), float(metrics["accuracy"].value()), int(mean.count)


def test_sequence():
    scores, labels = RNG.normal(size=(5, 3)).astype(np.float32), np.array([0, 2, 1, 1, 0])
    expected = -log_softmax(scores)[np.arange(5), labels].mean()
    assert run("sequence", scores, {"label": labels}) == pytest.approx((expected, (scores.argmax(1) == labels).mean(), 5))


def test_token_ignores_what_is_not_labelled():
    scores = RNG.normal(size=(2, 4, 3)).astype(np.float32)
    labels, mask = np.array([[0, 2, 1, -100], [1, -100, -100, -100]]), np.array([[1, 1, 1, 0], [1, 0, 0, 0]], bool)
    expected = [-log_softmax(scores)[i, j, labels[i, j]] for i, j in zip(*np.nonzero(mask), strict=True)]
    right = (scores.argmax(2) == labels)[mask].mean()
    assert run("token", scores, {"labels": labels, "mask": mask}) == pytest.approx((np.mean(expected), right, 4))


def test_span_is_over_the_tokens_of_the_row():
    scores = RNG.normal(size=(6, 4, 2)).astype(np.float32)
    scores[:, 3] = 50  # padding, however loud, is no answer
    batch = {"segments": np.array([[1, 1, 1, 0]] * 6), "start": np.array([1, 0, 0, 2, 1, 0]), "end": np.array([2, 2, 0, 2, 1, 1])}
    total, right = 0.0, []
    for row, first, last in zip(scores, batch["start"], batch["end"], strict=True):
        total -= (log_softmax(row[:3, 0])[first] + log_softmax(row[:3, 1])[last]) / 2
        best = max(((i, j) for i in range(3) for j in range(i, 3)), key=lambda p: row[p[0], 0] + row[p[1], 1])
        right.append(best == (first, last))
    assert 0 < np.mean(right) < 1
    assert run("span", scores, batch) == pytest.approx((total / 6, np.mean(right), 6))


def test_choice_does_not_count_choices_that_are_padding():
    scores = np.array([[[1.0], [2.0], [9.0]], [[0.0], [3.0], [1.0]]], np.float32)
    segments = np.ones((2, 3, 4), np.int32)
    segments[0, 2] = 0
    expected = -(log_softmax(scores[0, :2, 0])[1] + log_softmax(scores[1, :, 0])[0]) / 2
    assert run("choice", scores, {"segments": segments, "label": np.array([1, 0])}) == pytest.approx((expected, 0.5, 2))


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_gradients_are_finite_at_extremes(size):
    scores = jnp.asarray([[size, 0.0, -size]])
    grad = jax.grad(lambda s: classify.sequence(s, {"label": jnp.array([2])}).losses.sum())(scores)
    assert np.isfinite(grad).all() and np.abs(grad).max() <= 1


def test_a_span_of_padding_has_finite_gradients():
    batch = {"segments": np.zeros((1, 4), int), "start": np.array([0]), "end": np.array([0])}
    grad = jax.grad(lambda s: classify.span(s, batch).losses.sum())(jnp.ones((1, 4, 2)))
    assert np.isfinite(grad).all()


def test_macro_f1_by_hand():
    predicted, labels = np.array([0, 0, 1, 1, 2, 0]), np.array([0, 1, 1, 1, 0, 0])
    # class 0: tp 2, fp 1, fn 1; class 1: tp 2, fp 0, fn 1; classes 2 and 3 do not occur
    expected = np.mean([4 / 6, 4 / 5])
    np.testing.assert_allclose(classify.macro_f1(predicted, labels, 4), expected, rtol=1e-6)
    np.testing.assert_allclose(classify.macro_f1(labels, labels, 4), 1.0)
