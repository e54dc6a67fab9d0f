"""Online RL as one step of the loop: sample, score, make the update's batch, and several epochs of the same train step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxllm.core.types import Batch, Key, Mean, Params, TrainState
from jaxllm.train import faults
from jaxllm.train.compiled import counted
from jaxllm.train.step import Step, settled

Rollout = Callable[[Params, Batch, Key], Batch]
Reward = Callable[[Params, Batch], Any]
Metrics = dict[str, Mean]
FIRST = ("val/ratio", "policy/approxkl_avg", "kl")  # of the first update alone: 1, 0 and, on the reference, 0


def make_online_step(
    rollout: Rollout, reward: Reward, prepare: Callable[[Params, Params, Batch, Any], tuple[Batch, Metrics]], update: Step, *,
    epochs: int, minibatches: int, collect: Callable[..., tuple[Batch, Any, Metrics]] | None = None,
    observe: Callable[[Any, Metrics], Any] | None = None,
) -> Step:  # fmt: skip
    """step(state, frozen, prompts, rng) for `loop.fit`, where one step is one iteration of RL.

    rollout(params, prompts, key) -> samples; reward(frozen, samples) -> scores [b] or a tree of such columns ({scores, valid},
    say), on the device or on the host; prepare(params, frozen, samples, scores) -> (the update's batch, metrics); update is a
    train step that donates its state. Each epoch shuffles the rows and walks them in `minibatches` parts. state.step counts
    iterations; the optimizer's own count counts updates.

    collect: how rollout and reward become samples, `once` unless given (`partial(until_informative, ...)` for dynamic
    sampling). observe(memory, metrics of prepare) -> memory: what an iteration leaves to the next one (a KL coefficient, a
    running baseline); the state's optimizer is then `remembering(tx, memory)`, so that checkpoints hold it, and reward and
    prepare find it as frozen["memory"].
    """
    collect, update = collect or once, counted(update, "the update")

    @jax.jit
    def shuffled(batch: Batch, key: Key) -> list[Batch]:
        rows = jax.tree.leaves(batch)[0].shape[0]
        order = jax.random.permutation(key, rows).reshape(minibatches, -1)
        return [jax.tree.map(lambda x, i=i: x[order[i]], batch) for i in range(minibatches)]

    @jax.jit
    def pool(updates: list[Metrics]) -> Metrics:
        return jax.tree.map(lambda *ms: sum(ms[1:], ms[0]), *updates)

    def step(state: TrainState, frozen: Params, prompts: Batch, rng: Key) -> tuple[TrainState, Metrics]:
        iteration = state.step
        key = jax.random.fold_in(rng, iteration)
        known = frozen if observe is None else {**frozen, "memory": state.opt_state.memory}
        samples, scores, sampling = collect(rollout, reward, state.params, known, prompts, jax.random.fold_in(key, 0))
        batch, metrics = settled(prepare(state.params, known, samples, scores))
        faults.point("after:rollout")
        if observe is not None:
            state = _remember(state, observe, metrics)
        kept = jnp.copy(iteration)  # the update donates the state
        updates: list[Metrics] = []
        for epoch in range(epochs):
            for part in settled(shuffled(batch, jax.random.fold_in(key, 1 + epoch))):
                state, inner = settled(update(state, frozen, part, key))
                updates.append(inner)
                faults.point("mid:update")
        pooled = settled(pool(updates))
        first = {f"first/{name}": value for name, value in updates[0].items() if name in FIRST}
        return state.replace(step=kept + 1), sampling | metrics | pooled | first

    return step


def once(
    rollout: Rollout, reward: Reward, params: Params, frozen: Params, prompts: Batch, key: Key
) -> tuple[Batch, Any, Metrics]:
    """One rollout of the prompts and its scores: (samples, scores, no metrics)."""
    samples = settled(rollout(params, prompts, key))
    faults.point("mid:rollout")
    return samples, settled(reward(frozen, samples)), {}


def until_informative(
    rollout: Rollout, reward: Reward, params: Params, frozen: Params, prompts: Batch, key: Key, *,
    informative: Callable[[Any], jax.Array], parts: int,
) -> tuple[Batch, Any, Metrics]:  # fmt: skip
    """Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): the prompts part by part, until one part's worth of groups differ.

    prompts holds `parts` times the prompts of an update; informative(scores) -> bool [groups of a part]. Groups without a
    signal are replaced by informative ones of later parts; what is left of them when the prompts run out stays, and has no
    gradient. `sampling/parts` is how many rollouts it took, `sampling/informative` the share of groups with a signal.
    """
    rows = jax.tree.leaves(prompts)[0].shape[0] // parts
    kept: Any = None
    for part in range(parts):
        mine = jax.tree.map(lambda x, part=part: x[part * rows : (part + 1) * rows], prompts)
        samples, scores, _ = once(rollout, reward, params, frozen, mine, jax.random.fold_in(key, part))
        new = ((samples, scores), informative(scores))
        kept = new if kept is None else settled(_fill(kept, new))
        if np.asarray(kept[1]).all():
            break
    (samples, scores), good = kept
    metrics = {
        "sampling/parts": Mean(jnp.float32(part + 1), jnp.float32(1)),
        "sampling/informative": Mean(jnp.sum(good, dtype=jnp.float32), jnp.float32(good.size)),
    }
    return samples, scores, metrics


@jax.jit
def _fill(kept: Any, new: Any) -> Any:
    """The groups of two (rows, good) with the good ones first, as many groups as one of them has."""
    rows, good = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), kept, new)
    groups = good.shape[0] // 2
    order = jnp.argsort(~good, stable=True)[:groups]

    def take(x: jax.Array) -> jax.Array:
        by_group = x.reshape(2 * groups, -1, *x.shape[1:])[order]
        return by_group.reshape(-1, *x.shape[1:])

    return jax.tree.map(take, rows), good[order]


class Remembering(NamedTuple):
    """An optimizer's state and what else a run has to remember between iterations."""

    inner: Any
    memory: Any


def remembering(tx: optax.GradientTransformation, memory: Any) -> optax.GradientTransformation:
    """tx whose state carries `memory` (a tree of arrays) along, untouched: checkpointed and restored with the moments."""

    tx = optax.with_extra_args_support(tx)

    def init(params: Params) -> Remembering:
        return Remembering(tx.init(params), jax.tree.map(jnp.array, memory))

    def update(grads: Any, state: Remembering, params: Params | None = None, **extra: Any) -> tuple[Any, Remembering]:
        updates, inner = tx.update(grads, state.inner, params, **extra)
        return updates, Remembering(inner, state.memory)

    return optax.GradientTransformationExtraArgs(init, update)


def _remember(state: TrainState, observe: Callable[[Any, Metrics], Any], metrics: Metrics) -> TrainState:
    """The state with the memory after this iteration, every leaf where it was: the compiled update expects that."""
    old = state.opt_state.memory

    def one(x: jax.Array, like: jax.Array) -> jax.Array:
        x = jnp.copy(x)  # the update donates it, and metrics may share the buffers of what observe has left as it was
        return jax.device_put(x, like.sharding) if like.committed else x  # a new placement would compile the update again

    new = jax.tree.map(one, observe(old, metrics), old)
    return state.replace(opt_state=state.opt_state._replace(memory=new))


def masked_sum(values: Any, mask: Any) -> jax.Array:
    """Sum over the length where mask: [b, l] -> [b]."""
    return jnp.sum(jnp.where(mask, values, 0.0), axis=1)
