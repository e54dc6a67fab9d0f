"""Masked-language modelling, alone or with BERT's next-sentence task."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxllm.core import ops
from jaxllm.core.types import Batch, Key, LossFn, Mean, Model, Params, mean_of

Corrupt = Callable[[Key, Batch], tuple[jax.Array, jax.Array]]  # -> (inputs int [b, l], chosen bool [b, l])


def loss(model: Model, corrupt: Corrupt, *, root: str = "policy", chunk: int | None = None) -> LossFn:
    """L = -sum_t m_t log p(x_t | corrupted x) / sum_t m_t over the chosen tokens (arXiv 1810.04805, task 1).

    corrupt(key, batch) -> (inputs, chosen): `data.masking.dynamic` draws anew at every step, `data.masking.static` reads
    columns. batch: tokens, segments, perhaps types, and what `corrupt` reads. With dynamic masking the count is drawn with the
    step, so a loss is equal under accumulation only in expectation. Metrics: loss, mean_token_accuracy, mask_rate.
    """

    def loss_fn(params: Params, batch: Batch, rng: Key) -> tuple[Mean, dict[str, Mean]]:
        mean, metrics, _ = _terms(model, corrupt, params[root], batch, rng, chunk)
        return mean, metrics

    return loss_fn


def with_next_sentence(model: Model, corrupt: Corrupt, *, root: str = "policy", chunk: int | None = None) -> LossFn:
    """The masked-LM loss plus -log p(is_next | pooled first position), each a mean of its own (arXiv 1810.04805, A.2).

    model: `pooled.with_next_sentence_head`. batch also has is_next [b]. The denominator is the number of rows: the masked-LM
    term's mean is taken per micro-batch. More metrics: mlm_loss, nsp_loss, nsp_accuracy.
    """

    def loss_fn(params: Params, batch: Batch, rng: Key) -> tuple[Mean, dict[str, Mean]]:
        mlm, metrics, aux = _terms(model, corrupt, params[root], batch, rng, chunk)
        scores, labels = aux["next_sentence"], 1 - batch["is_next"].astype(jnp.int32)
        nsp = mean_of(-jnp.take_along_axis(jax.nn.log_softmax(scores), labels[:, None], axis=1)[:, 0])
        mean = Mean(mlm.value() * nsp.count + nsp.total, nsp.count)
        right = mean_of(scores.argmax(axis=1) == labels)
        return mean, {**metrics, "loss": mean, "mlm_loss": mlm, "nsp_loss": nsp, "nsp_accuracy": right}

    return loss_fn


def _terms(model: Model, corrupt: Corrupt, params: Params, batch: Batch, rng: Key, chunk: int | None):
    """(the masked-LM Mean, its metrics, the trunk's aux)."""
    inputs, chosen = corrupt(rng, batch)
    out = model.apply(params, inputs, segments=batch["segments"], types=batch.get("types"), rng=rng)
    total, correct = ops.cross_entropy(model.head(params), out.hidden, batch["tokens"], chosen, chunk)
    count = chosen.sum().astype(jnp.float32)
    mean = Mean(total, count)
    rate = Mean(count, (batch["segments"] != 0).sum().astype(jnp.float32))
    return mean, {"loss": mean, "mean_token_accuracy": Mean(correct, count), "mask_rate": rate}, out.aux
