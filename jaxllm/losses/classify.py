"""Classification: of rows, of tokens, of the ends of a span, and of choices."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.core.types import Batch, Key, LossFn, Mean, Params, mean_of

NEGATIVE = -1e30  # finite, so that a masked score never makes inf - inf


class Parts(NamedTuple):
    """Arrays of one shape: the loss of each example, the predicted and the true label, and whether it counts."""

    losses: jax.Array
    predicted: jax.Array
    labels: jax.Array
    weights: jax.Array


Kind = Callable[[jax.Array, Batch], Parts]


def nll(scores: jax.Array, labels: jax.Array) -> jax.Array:
    """-log softmax(scores)[label]: [..., n] and int [...] -> [...] float32."""
    log_p = jax.nn.log_softmax(scores.astype(jnp.float32))
    return -jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]


def sequence(scores: jax.Array, batch: Batch) -> Parts:
    """Cross-entropy of a row's label: scores [b, n], batch has label int [b] -> Parts [b]."""
    labels = batch["label"]
    return Parts(nll(scores, labels), scores.argmax(axis=-1), labels, jnp.ones(labels.shape, bool))


def token(scores: jax.Array, batch: Batch) -> Parts:
    """Cross-entropy of every labelled token: scores [b, l, n], batch has labels int [b, l] and mask bool [b, l] -> [b, l]."""
    labels = jnp.where(batch["mask"], batch["labels"], 0)
    return Parts(nll(scores, labels), scores.argmax(axis=-1), labels, batch["mask"])


def span(scores: jax.Array, batch: Batch) -> Parts:
    """Half the sum of -log p(first) and -log p(last), each over the row's tokens (arXiv 1810.04805, 4.2).

    scores [b, l, 2]; batch has segments [b, l], start and end int [b] -> Parts [b]. The label is first * l + last, so that it
    is right when both ends are; the predicted ends are the likeliest pair in which the last is not before the first.
    """
    length = scores.shape[1]
    scores = jnp.where((batch["segments"] != 0)[..., None], scores.astype(jnp.float32), NEGATIVE).transpose(0, 2, 1)
    ends = jnp.stack([batch["start"], batch["end"]], axis=1)
    ordered = jnp.tril(jnp.ones((length, length), bool)).T
    pairs = jnp.where(ordered[None], scores[:, 0, :, None] + scores[:, 1, None, :], 2 * NEGATIVE)
    best = pairs.reshape(-1, length * length).argmax(axis=1)
    return Parts(nll(scores, ends).mean(axis=1), best, ends[:, 0] * length + ends[:, 1], jnp.ones(len(ends), bool))


def choice(scores: jax.Array, batch: Batch) -> Parts:
    """Cross-entropy over a row's choices: scores [b, c, 1]; batch has label int [b], and segments [b, c, l], in which a choice
    that is padding only does not count."""
    there = (batch["segments"] != 0).any(axis=-1)
    return sequence(jnp.where(there, scores[..., 0], NEGATIVE), batch)


KINDS: dict[str, Kind] = {"sequence": sequence, "token": token, "span": span, "choice": choice}


def loss(scores: Callable[[Params, Batch], jax.Array], kind: Kind, *, root: str = "classifier") -> LossFn:
    """The mean loss of scores(params, batch) under one of the kinds above, as `loss(partial(pooled.scores, model), token)`.

    Metrics: loss, accuracy.
    """

    def loss_fn(params: Params, batch: Batch, rng: Key) -> tuple[Mean, dict[str, Mean]]:
        parts = kind(scores(params[root], batch), batch)
        mean = mean_of(parts.losses, parts.weights)
        return mean, {"loss": mean, "accuracy": mean_of(parts.predicted == parts.labels, parts.weights)}

    return loss_fn


def macro_f1(predicted: jax.Array, labels: jax.Array, n_labels: int) -> jax.Array:
    """The mean over the labels that occur of 2 tp / (2 tp + fp + fn): int [m], int [m] -> []."""
    p, y = (jax.nn.one_hot(x, n_labels, dtype=jnp.float32) for x in (predicted, labels))
    hits, sizes = jnp.sum(p * y, axis=0), jnp.sum(p, axis=0) + jnp.sum(y, axis=0)
    occurs = y.any(axis=0)
    return jnp.sum(jnp.where(occurs, 2 * hits / jnp.maximum(sizes, 1), 0)) / jnp.maximum(occurs.sum(), 1)
