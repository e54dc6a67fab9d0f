"""Online RL as one step of the loop: sample, score, make the update's batch, and several epochs of the same train step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.core.types import Batch, Key, Mean, Params, TrainState
from jaxllm.train.step import Step, settled


def make_online_step(
    rollout: Callable[[Params, Batch, Key], Batch], reward: Callable[[Params, Batch], jax.Array],
    prepare: Callable[[Params, Params, Batch, jax.Array], tuple[Batch, dict[str, Mean]]], update: Step, *, epochs: int,
    minibatches: int,
) -> Step:  # fmt: skip
    """step(state, frozen, prompts, rng) for `loop.fit`, where one step is one iteration of RL.

    rollout(params, prompts, key) -> samples; reward(frozen, samples) -> scores [b], on the device or on the host;
    prepare(params, frozen, samples, scores) -> (the update's batch, metrics); update is a train step that donates its state.
    Each epoch shuffles the rows and walks them in `minibatches` parts. state.step counts iterations; the optimizer's own
    count counts updates.
    """

    @jax.jit
    def shuffled(batch: Batch, key: Key) -> list[Batch]:
        rows = jax.tree.leaves(batch)[0].shape[0]
        order = jax.random.permutation(key, rows).reshape(minibatches, -1)
        return [jax.tree.map(lambda x, i=i: x[order[i]], batch) for i in range(minibatches)]

    @jax.jit
    def pool(updates: list[dict[str, Mean]]) -> dict[str, Mean]:
        return jax.tree.map(lambda *ms: sum(ms[1:], ms[0]), *updates)

    def step(state: TrainState, frozen: Params, prompts: Batch, rng: Key) -> tuple[TrainState, dict[str, Mean]]:
        iteration = state.step
        key = jax.random.fold_in(rng, iteration)
        samples = settled(rollout(state.params, prompts, jax.random.fold_in(key, 0)))
        scores = settled(reward(frozen, samples))
        batch, metrics = settled(prepare(state.params, frozen, samples, scores))
        kept = jnp.copy(iteration)  # the update donates the state
        updates: list[dict[str, Mean]] = []
        for epoch in range(epochs):
            for part in settled(shuffled(batch, jax.random.fold_in(key, 1 + epoch))):
                state, inner = settled(update(state, frozen, part, key))
                updates.append(inner)
        pooled = settled(pool(updates))
        first = {f"first/{name}": value for name, value in updates[0].items() if name in ("val/ratio", "policy/approxkl_avg")}
        return state.replace(step=kept + 1), metrics | pooled | first

    return step


def masked_sum(values: Any, mask: Any) -> jax.Array:
    """Sum over the length where mask: [b, l] -> [b]."""
    return jnp.sum(jnp.where(mask, values, 0.0), axis=1)
