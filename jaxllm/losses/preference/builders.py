"""From array-level losses on pairs to LossFns: log-probabilities of both sides, the NLL term, metrics, bad pairs."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxllm.core import ops
from jaxllm.core.types import Batch, Key, LossFn, Mean, Model, Params, mean_of
from jaxllm.losses.preference.pairs import PairLogps

PairLoss = Callable[..., jax.Array]  # (PairLogps, *, beta, ...) -> losses [b]
SIDES = ("chosen", "rejected")


def token_logps(model: Model, params: Params, record: Batch, chunk: int | None = None) -> jax.Array:
    """log p(target) of a sequence record, 0 outside its mask: [b, l]."""
    return jnp.where(record["mask"], ops.model_logps(model, params, record, chunk).logp, 0.0)


def sequence_logps(model: Model, params: Params, record: Batch, chunk: int | None = None) -> jax.Array:
    """Sum of log p(target) over the mask of a sequence record: [b]."""
    return jnp.sum(token_logps(model, params, record, chunk), axis=1)


def joined(batch: Batch) -> Batch:
    """Both sides of a batch of pairs as one sequence record of 2b rows, the chosen first."""
    return jax.tree.map(lambda c, r: jnp.concatenate([c, r]), batch["chosen"], batch["rejected"])


def identical(batch: Batch) -> jax.Array:
    """Whether the two sides of a pair are the same sequence with the same trained targets: bool [b]."""
    chosen, rejected = batch["chosen"], batch["rejected"]
    same = [jnp.all(chosen[name] == rejected[name], axis=1) for name in ("tokens", "targets", "mask")]
    return jnp.all(jnp.stack(same), axis=0)


def side_logps(model: Model, params: Params, batch: Batch, chunk: int | None = None) -> tuple[jax.Array, jax.Array]:
    """log p(target) of the chosen and of the rejected side, each [b, l]; the caller applies masks.

    Both go through the model as one batch of 2b rows. An identical pair says nothing about preference: no gradient flows from it.
    """
    logp = ops.model_logps(model, params, joined(batch), chunk).logp
    same = jnp.concatenate([identical(batch)] * 2)[:, None]
    return tuple(jnp.split(jnp.where(same, jax.lax.stop_gradient(logp), logp), 2))


def lengths(batch: Batch) -> list[jax.Array]:
    """Trained targets of the two sides, each float32 [b]."""
    return [batch[side]["mask"].sum(axis=1).astype(jnp.float32) for side in SIDES]


def sums(batch: Batch, sides: tuple[jax.Array, jax.Array]) -> list[jax.Array]:
    """Sums over the masks of per-token values of the two sides [b, l], each [b]."""
    return [jnp.sum(jnp.where(batch[s]["mask"], x, 0.0), axis=1) for s, x in zip(SIDES, sides, strict=True)]


def pair_logps(model: Model, params: Params, batch: Batch, chunk: int | None = None) -> PairLogps:
    """PairLogps of a batch {chosen, rejected: sequence records; ref_chosen_logps, ref_rejected_logps [b]}."""
    policy = sums(batch, side_logps(model, params, batch, chunk))
    return PairLogps(*policy, batch["ref_chosen_logps"], batch["ref_rejected_logps"], *lengths(batch))


def token_mean(mask: jax.Array) -> jax.Array:
    """The column `nll_weights` [b, l] with which the NLL term is the mean over a batch's tokens of `mask`, as ORPO's is.

    Made over the whole batch, before it is split: each micro-batch's share is then its own, and accumulation changes nothing.
    """
    return mask * (mask.shape[0] / jnp.maximum(mask.sum(), 1)).astype(jnp.float32)


def chosen_nll(batch: Batch, logp: jax.Array) -> jax.Array:
    """NLL of the chosen side from its log p(target) [b, l]: [b], per token of each pair, or under the column `nll_weights`."""
    mask = batch["chosen"]["mask"]
    each = mask / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
    weights = batch.get("nll_weights", each)
    return -jnp.sum(jnp.where(weights != 0, logp, 0.0) * weights, axis=1)


def with_metrics(batch: Batch, logps: PairLogps, losses: jax.Array, nll: jax.Array, beta: float) -> tuple[Mean, dict[str, Mean]]:
    """(mean of losses [b], metrics): TRL's names, and the shares of identical pairs and of pairs with an empty side.

    rewards/* are beta * (log pi - log ref).
    """
    mean = mean_of(losses)
    chosen, rejected = beta * (logps.chosen - logps.ref_chosen), beta * (logps.rejected - logps.ref_rejected)
    return mean, {
        "loss": mean,
        "rewards/chosen": mean_of(chosen),
        "rewards/rejected": mean_of(rejected),
        "rewards/margins": mean_of(chosen - rejected),
        "rewards/accuracies": mean_of(chosen > rejected),
        "logps/chosen": mean_of(logps.chosen),
        "logps/rejected": mean_of(logps.rejected),
        "nll_loss": mean_of(nll),
        "pairs/identical": mean_of(identical(batch)),
        "pairs/empty": mean_of((logps.chosen_length == 0) | (logps.rejected_length == 0)),
    }


def loss(model: Model, fn: PairLoss, *, beta: float, nll_weight: float = 0.0, chunk: int | None = None, **hyper: float) -> LossFn:
    """A LossFn from a sibling: mean over pairs of fn(logps, beta=beta, **hyper) + nll_weight * NLL of the chosen.

    The NLL term (RPO, arXiv 2404.19733; ORPO, CPO) keeps the chosen completion likely. It is per token of each pair, which weighs
    1 whatever its length, unless the batch has a column `nll_weights` [b, l] (`token_mean`). Metrics: see `with_metrics`.
    """

    def loss_fn(params: Params, batch: Batch, rng: Key) -> tuple[Mean, dict[str, Mean]]:
        tokens = side_logps(model, params["policy"], batch, chunk)
        references = batch["ref_chosen_logps"], batch["ref_rejected_logps"]
        logps = PairLogps(*sums(batch, tokens), *references, *lengths(batch))
        nll = chosen_nll(batch, tokens[0])
        return with_metrics(batch, logps, fn(logps, beta=beta, **hyper) + nll_weight * nll, nll, beta)

    return loss_fn


def combined(*terms: tuple[PairLoss, float]) -> PairLoss:
    """One sibling from several: the weighted sum of (sibling, weight) terms that share beta; MPO (arXiv 2411.10442) is one.

    What a term takes beyond beta is bound beforehand, with functools.partial.
    """

    def fn(logps: PairLogps, *, beta: float) -> jax.Array:
        return sum(weight * term(logps, beta=beta) for term, weight in terms)

    return fn
