"""Reward modelling: from pairs, from rankings, from outcomes and from steps; what an ensemble makes of its members' scores.

Array-level functions are siblings on scores; `score` reads a row's reward at its last token; the builders make LossFns.
`scalars(params, record) -> [b, l]` is the model's head (heads.scalars).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxllm.core.ops import NEGATIVE
from jaxllm.core.types import Batch, Key, LossFn, Mean, Params, mean_of

Scalars = Callable[[Params, Batch], jax.Array]


# ---- losses on scores


def bradley_terry(chosen: jax.Array, rejected: jax.Array, margin: jax.Array | float = 0.0) -> jax.Array:
    """-log sigmoid(r(y_w) - r(y_l) - m), [b] -> [b]: the Bradley-Terry likelihood (arXiv 2203.02155, equation 1).

    m [b] asks for a larger gap where the annotators saw one (arXiv 2307.09288, equation 2); 0 is the plain likelihood.
    Limits: equal rewards give log 2 at m = 0; swapping a pair with gap g raises the loss by exactly g.
    """
    return -jax.nn.log_sigmoid(chosen - rejected - margin)


def kwise(scores: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    """Mean of -log sigmoid(r_i - r_j) over all pairs i before j of a ranking: scores [b, k], the best first -> [b].

    All C(k, 2) pairs stand in one batch element, each completion goes through the model once and the sum is divided by C(k, 2)
    (arXiv 2203.02155, equation 1 and section 3.5). valid bool [b, k]: completions that are there; fewer than two give 0.
    Limits: k = 2 is bradley_terry; equal scores give log 2.
    """
    losses, pair = _ordered(-jax.nn.log_sigmoid(scores[:, :, None] - scores[:, None, :]), valid)
    return losses / jnp.maximum(pair, 1)


def plackett_luce(scores: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    """-sum_i (r_i - logsumexp_{j >= i} r_j): the likelihood of drawing the ranking best first, [b, k] -> [b] (Plackett, 1975).

    valid bool [b, k] as in kwise. Limits: k = 2 is bradley_terry; equal scores give log k!.
    """
    valid = jnp.ones(scores.shape, bool) if valid is None else valid
    here = jnp.where(valid, scores, NEGATIVE)
    rest = jax.lax.cumlogsumexp(here, axis=1, reverse=True)
    return jnp.sum(jnp.where(valid, rest - here, 0.0), axis=1)


def binary(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-y log sigmoid(s) - (1 - y) log sigmoid(-s), elementwise: an outcome (arXiv 2110.14168) or a step (2305.20050).

    labels are bool or a probability. Limits: s = 0 gives log 2; the gradient is sigmoid(s) - y.
    """
    labels = labels.astype(jnp.float32)
    return -labels * jax.nn.log_sigmoid(logits) - (1 - labels) * jax.nn.log_sigmoid(-logits)


def _ordered(values: jax.Array, valid: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Sum and number of values [b, k, k] over the pairs i before j of completions that are there: two [b]."""
    k = values.shape[1]
    pair = jnp.triu(jnp.ones((1, k, k), bool), 1)
    if valid is not None:
        pair = pair & valid[:, :, None] & valid[:, None, :]
    return jnp.sum(jnp.where(pair, values, 0.0), axis=(1, 2)), jnp.sum(pair & jnp.ones(values.shape, bool), axis=(1, 2))


# ---- where a reward is read


def at_last_token(values: jax.Array, record: Batch) -> jax.Array:
    """values [b, l] at the position that reads the last token of each row: [b].

    A sequence record's last real position predicts the end token; the end token itself is its target, so records for
    reward models are made with one position more (see `with_last_token`).
    """
    last = jnp.maximum(jnp.sum(record["segments"] != 0, axis=1) - 1, 0)
    return jnp.take_along_axis(values, last[:, None], axis=1)[:, 0]


def with_last_token(record: Batch) -> Batch:
    """The record with each row's final target appended as an input, so that the model reads the end token: [b, l + 1]."""
    length = jnp.sum(record["segments"] != 0, axis=1)
    last = jnp.take_along_axis(record["targets"], jnp.maximum(length - 1, 0)[:, None], axis=1)
    index = jnp.arange(record["tokens"].shape[1] + 1)[None, :]
    tokens = jnp.where(index == length[:, None], last, jnp.pad(record["tokens"], ((0, 0), (0, 1))))
    return {"tokens": tokens, "segments": (index <= length[:, None]).astype(jnp.int32)}


def score(scalars: Scalars, params: Params, record: Batch) -> jax.Array:
    """The reward of each row, read at its last token (the end token): [b] float32."""
    record = with_last_token(record)
    return at_last_token(scalars(params, record), record)


def step_logps(logits: jax.Array, step_ends: jax.Array) -> jax.Array:
    """log sigmoid of the logits [b, l] at step ends (bool [b, l]), 0 elsewhere: log-probabilities that each step is right."""
    return jnp.where(step_ends, jax.nn.log_sigmoid(logits), 0.0)


def weakest_step(log_right: jax.Array) -> jax.Array:
    """A solution is as good as its worst step: the minimum of step_logps, [b, l] -> [b] (arXiv 2305.20050)."""
    return jnp.min(log_right, axis=1)


def all_steps(log_right: jax.Array) -> jax.Array:
    """The log-probability that every step is right, as if independent: the sum of step_logps, [b, l] -> [b] (2305.20050)."""
    return jnp.sum(log_right, axis=1)


# ---- ensembles: the members' scores [members, b] -> [b]


def ensemble(scores: Callable[[Params, Batch], jax.Array], params: Params, record: Batch) -> jax.Array:
    """scores(params, record) [b] of every member, whose params have a leading axis: [members, b].

    Members that start from the same weights and read the same rows are one model: give them other heads, orders or rows.
    """
    return jax.vmap(scores, in_axes=(0, None))(params, record)


def ensemble_mean(scores: jax.Array) -> jax.Array:
    """mean_i r_i: what the members agree on (arXiv 2310.02743)."""
    return jnp.mean(scores, axis=0)


def worst_case(scores: jax.Array) -> jax.Array:
    """min_i r_i: no member may be fooled (arXiv 2310.02743)."""
    return jnp.min(scores, axis=0)


def variance_penalised(scores: jax.Array, *, weight: float) -> jax.Array:
    """mean_i r_i - weight * var_i r_i: uncertainty-weighted optimisation (arXiv 2310.02743). weight 0 is the mean."""
    return jnp.mean(scores, axis=0) - weight * jnp.var(scores, axis=0)


# ---- builders


def loss(scalars: Scalars, *, root: str = "reward", center: float = 0.0) -> LossFn:
    """Bradley-Terry over {chosen, rejected} sequence records, and `margin` [b] where the batch has that column.

    center adds center * (r_w + r_l)^2, which only fixes the free constant (arXiv 2312.09244). Metrics have TRL's names.
    """

    def loss_fn(params: Params, batch: Batch, rng: Key) -> tuple[Mean, dict[str, Mean]]:
        both = jax.tree.map(lambda c, r: jnp.concatenate([c, r]), batch["chosen"], batch["rejected"])
        chosen, rejected = jnp.split(score(scalars, params[root], both), 2)
        losses = bradley_terry(chosen, rejected, batch.get("margin", 0.0)) + center * (chosen + rejected) ** 2
        mean = mean_of(losses)
        return mean, {
            "loss": mean,
            # a tie is half right: counting it as wrong would reward noise at the start, when every score is 0
            "accuracy": mean_of((chosen > rejected) + 0.5 * (chosen == rejected)),
            "margin": mean_of(chosen - rejected),
            "mean_reward": mean_of((chosen + rejected) / 2),
        }

    return loss_fn


def ranked_loss(
    scalars: Scalars, fn: Callable[[jax.Array, jax.Array], jax.Array] = kwise, *, root: str = "reward", center: float = 0.0
) -> LossFn:  # fmt: skip
    """Rankings: fn(scores, valid) over {ranked: sequence record [b, k, l], the best first; valid: bool [b, k]}.

    fn: kwise or plackett_luce. A row with fewer than two completions weighs nothing. center adds 4 * center * the row's squared
    mean reward, which at k = 2 is `loss`'s. accuracy and margin are over pairs, as in `loss`.
    """

    def loss_fn(params: Params, batch: Batch, rng: Key) -> tuple[Mean, dict[str, Mean]]:
        valid = batch["valid"]
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch["ranked"])
        scores = score(scalars, params[root], rows).reshape(valid.shape)
        average = jnp.sum(jnp.where(valid, scores, 0.0), axis=1) / jnp.maximum(valid.sum(axis=1), 1)
        real = valid.sum(axis=1) > 1
        mean = mean_of(fn(scores, valid) + 4 * center * average**2, real)
        gap = scores[:, :, None] - scores[:, None, :]
        right, pairs = _ordered((gap > 0) + 0.5 * (gap == 0), valid)
        return mean, {
            "loss": mean,
            "accuracy": Mean(right.sum(), pairs.sum().astype(jnp.float32)),
            "margin": Mean(_ordered(gap, valid)[0].sum(), pairs.sum().astype(jnp.float32)),
            "mean_reward": mean_of(average, real),
        }

    return loss_fn


def outcome_loss(scalars: Scalars, *, root: str = "reward") -> LossFn:
    """Whether a whole completion is right: binary over {record: sequence record, label: bool [b]}, read at the last token."""

    def loss_fn(params: Params, batch: Batch, rng: Key) -> tuple[Mean, dict[str, Mean]]:
        logits = score(scalars, params[root], batch["record"])
        return _judged(logits, batch["label"], jnp.ones(logits.shape, bool))

    return loss_fn


def process_loss(scalars: Scalars, *, root: str = "reward") -> LossFn:
    """Whether each step is right: binary at the tokens that end one, each step weighing the same (arXiv 2305.20050).

    The batch is {record: {tokens, segments}, step_ends: bool [b, l], step_labels: bool [b, l], read at step ends only}; a step
    that ends at tokens[t] is read at position t.
    """

    def loss_fn(params: Params, batch: Batch, rng: Key) -> tuple[Mean, dict[str, Mean]]:
        return _judged(scalars(params[root], batch["record"]), batch["step_labels"], batch["step_ends"])

    return loss_fn


def _judged(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> tuple[Mean, dict[str, Mean]]:
    """Binary loss and its metrics over the entries with weight."""
    mean = mean_of(binary(logits, labels), weights)
    right = jnp.where(logits == 0, 0.5, (logits > 0) == (labels > 0.5))
    positive = mean_of(labels, weights)  # the accuracy of always saying the commoner answer is max(p, 1 - p)
    return mean, {"loss": mean, "accuracy": mean_of(right, weights), "positive": positive, "logits": mean_of(logits, weights)}
