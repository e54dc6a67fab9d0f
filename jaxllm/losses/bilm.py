"""The objective of a bidirectional language model: next tokens read forward, previous tokens read backward."""

from __future__ import annotations

from jaxllm.core import ops
from jaxllm.core.types import Batch, Key, LossFn, Mean, Model, Params


def loss(model: Model, *, root: str = "policy", chunk: int | None = None) -> LossFn:
    """L = -(1 / 2M) sum_t m_t [log p(y_t | x_1 .. x_t) + log p(x_t | y_t .. y_l)], M = sum_t m_t (arXiv 1802.05365, eq. 1).

    x: the record's tokens, y: its targets, so x_{t+1} = y_t inside a segment: the forward model reads the tokens
    and predicts the targets, the backward model reads the targets from the end and predicts the tokens; neither sees what
    it predicts. Both directions share the embedding and the head. Metrics: loss (nats per prediction), forward, backward.
    """

    def loss_fn(params: Params, batch: Batch, rng: Key) -> tuple[Mean, dict[str, Mean]]:
        params, head = params[root], model.head(params[root])
        count = batch["mask"].sum().astype("float32")

        def one(direction: str, given: str, wanted: str) -> Mean:
            # the other direction's states are not used here: the compiler leaves them out
            out = model.apply(params, batch[given], segments=batch["segments"], rng=rng, taps=(direction,))
            total, _ = ops.cross_entropy(head, out.aux[direction], batch[wanted], batch["mask"], chunk)
            return Mean(total, count)

        forward, backward = one("forward", "tokens", "targets"), one("backward", "targets", "tokens")
        both = forward + backward
        return both, {"loss": both, "forward": forward, "backward": backward}

    return loss_fn
