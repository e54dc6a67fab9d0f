"""Next-token prediction: pretraining and supervised fine-tuning differ only in the mask of the batch."""

from __future__ import annotations

from jaxllm.core import ops
from jaxllm.core.types import Batch, Key, LossFn, Mean, Model, Params


def loss(model: Model, *, root: str = "policy", chunk: int | None = None) -> LossFn:
    """L = -sum_t m_t log p(y_t | x_<=t) / sum_t m_t over a sequence record's tokens, targets, segments and mask.

    For pretraining every target is in the mask; for supervised fine-tuning (InstructGPT's first step, arXiv 2203.02155)
    only the assistant's tokens and its end token. Metrics: loss, mean_token_accuracy.
    """

    def loss_fn(params: Params, batch: Batch, rng: Key) -> tuple[Mean, dict[str, Mean]]:
        hidden = model.apply(params[root], batch["tokens"], segments=batch["segments"], rng=rng).hidden
        total, correct = ops.cross_entropy(model.head(params[root]), hidden, batch["targets"], batch["mask"], chunk)
        count = batch["mask"].sum().astype("float32")
        mean = Mean(total, count)
        return mean, {"loss": mean, "mean_token_accuracy": Mean(correct, count)}

    return loss_fn
