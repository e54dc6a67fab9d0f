"""The train step: one function for every objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxllm.core.tree import merge, partition
from jaxllm.core.types import Batch, Key, LossFn, Mean, Params, TrainState
from jaxllm.train import guard

Step = Callable[[TrainState, Params, Batch, Key], tuple[TrainState, dict[str, Mean]]]


def init_state(params: Params, tx: optax.GradientTransformation, trainable: str = ".*") -> tuple[TrainState, Params]:
    """(state of the leaves whose path matches `trainable`, the frozen others). The optimizer only sees the former."""
    chosen, frozen = split_trainable(params, trainable)
    return TrainState(jnp.int32(0), chosen, tx.init(chosen)), frozen


def split_trainable(params: Params, trainable: str) -> tuple[Params, Params]:
    """(the leaves whose path matches `trainable`, the others)."""
    chosen, frozen = partition(params, trainable)
    if not chosen:
        raise ValueError(f"trainable={trainable!r} matches no parameter")
    return chosen, frozen


def trained_roots(params: Params, frozen: Params) -> Params:
    """The roots that are trained, whole: where one is trained in part, its other leaves are those of `frozen`, not copies."""
    return merge(params, {root: frozen[root] for root in params if root in frozen})


def make_train_step(loss_fn: LossFn, tx: optax.GradientTransformation, *, accumulate: int = 1) -> Step:
    """step(state, frozen, batch, rng) -> (state, metrics); jit it with donation of `state` only.

    loss_fn sees the whole tree, gradients exist for state.params. With accumulate = a the batch is walked in a
    micro-batches: gradients of the losses' sums are added and divided by the added counts, so that 1 and 8 agree on ragged
    masks. Metrics are Means; grad_norm is the norm before clipping. rng is folded with the step. tx is told the loss and that
    norm, as `value` and `grad_norm`, where it takes them (`guard.guarded`).
    """
    tx = optax.with_extra_args_support(tx)

    def micro(params: Params, frozen: Params, batch: Batch, rng: Key):
        def total(params):
            mean, metrics = loss_fn(merge(params, frozen), batch, rng)
            return mean.total, (mean, metrics)

        (_, (mean, metrics)), grads = jax.value_and_grad(total, has_aux=True)(params)
        return grads, mean, metrics

    def step(state: TrainState, frozen: Params, batch: Batch, rng: Key) -> tuple[TrainState, dict[str, Mean]]:
        rng = jax.random.fold_in(rng, state.step)
        if accumulate == 1:
            grads, mean, metrics = micro(state.params, frozen, batch, rng)
        else:
            grads, mean, metrics = _accumulate(micro, state.params, frozen, batch, rng, accumulate)
        scale = 1.0 / jnp.where(mean.count == 0, 1.0, mean.count)
        grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
        norm = optax.tree.norm(grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, value=mean.value(), grad_norm=norm)
        metrics = metrics | {"grad_norm": Mean(norm, jnp.float32(1))} | guard.metrics(opt_state)
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), metrics

    return step


def overlapping() -> bool:
    """Whether dispatched programs may overlap: everywhere but on several simulated CPU devices, where they deadlock or abort."""
    return not (jax.default_backend() == "cpu" and jax.device_count() > 1)


def settled(tree: Any) -> Any:
    """The tree, waited for where programs must not overlap."""
    return tree if overlapping() else jax.block_until_ready(tree)


def _accumulate(micro: Callable, params: Params, frozen: Params, batch: Batch, rng: Key, n: int):
    """The sums of micro's (grads, loss, metrics) over n slices of the batch."""
    # interleaved slices: with the batch axis sharded, each device keeps its own rows
    slices = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 1, 0), batch)

    def body(carry, xs):
        index, part = xs
        return jax.tree.map(jnp.add, carry, micro(params, frozen, part, jax.random.fold_in(rng, index))), None

    shapes = jax.eval_shape(lambda b: micro(params, frozen, b, rng), jax.tree.map(lambda x: x[0], slices))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(body, zeros, (jnp.arange(n), slices))[0]
