"""Reward modelling from pairs."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxllm.core.types import Batch, Key, LossFn, Mean, Params, mean_of


def bradley_terry(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
    """-log sigmoid(r(y_w) - r(y_l)), [b] -> [b]: the Bradley-Terry likelihood (arXiv 2203.02155, equation 1).

    Limits: equal rewards give log 2; swapping a pair with margin m raises the loss by exactly m.
    """
    return -jax.nn.log_sigmoid(chosen - rejected)


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


def score(scalars: Callable[[Params, Batch], jax.Array], params: Params, record: Batch) -> jax.Array:
    """The reward of each row, read at its last token (the end token): [b] float32."""
    record = with_last_token(record)
    return at_last_token(scalars(params, record), record)


def loss(scalars: Callable[[Params, Batch], jax.Array], *, root: str = "reward", center: float = 0.0) -> LossFn:
    """Bradley-Terry over {chosen, rejected} sequence records; scalars(params, record) -> [b, l] is the model's head.

    center adds center * (r_w + r_l)^2, which only fixes the free constant (arXiv 2312.09244). Metrics have TRL's names.
    """

    def loss_fn(params: Params, batch: Batch, rng: Key) -> tuple[Mean, dict[str, Mean]]:
        both = jax.tree.map(lambda c, r: jnp.concatenate([c, r]), batch["chosen"], batch["rejected"])
        chosen, rejected = jnp.split(score(scalars, params[root], both), 2)
        losses = bradley_terry(chosen, rejected) + center * (chosen + rejected) ** 2
        mean = mean_of(losses)
        return mean, {
            "loss": mean,
            # a tie is half right: counting it as wrong would reward noise at the start, when every score is 0
            "accuracy": mean_of((chosen > rejected) + 0.5 * (chosen == rejected)),
            "margin": mean_of(chosen - rejected),
            "mean_reward": mean_of((chosen + rejected) / 2),
        }

    return loss_fn
