"""The guard of the weights: an update whose loss or gradient is not finite, or far out of what it was, is not made.

It stands around the optimizer, inside the compiled step, so that no host waits for it, and its memory is a part of the
optimizer's state: checkpoints hold it, and a resumed run skips what an uninterrupted one skips.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxllm.core.tree import flatten
from jaxllm.core.types import Mean, Params

WINDOW = 128  # updates that a spike is measured against
LEAST = 32  # of them must be there before anything is called a spike
FLOOR = 0.01  # of the mean: the least standard deviation, so that a quiet loss may rise
SPIKES = 5  # skipped in a row; the next one is no spike but a new level
MADE, SPIKE, NONFINITE = 0, 1, 2

# where `experiments.replay` hears of each update: (loss, gradient norm, {path: finite})
listener: ContextVar[Callable[[Any, Any, dict], None] | None] = ContextVar("listener", default=None)


class Guard(NamedTuple):
    """The optimizer's own state; losses and gradient norms float32 [2, WINDOW] of updates that were made, nan where there is
    none; how many were made since the window began; spikes skipped in a row; what became of the last update."""

    inner: Any
    window: jax.Array
    made: jax.Array
    spikes: jax.Array
    last: jax.Array


class NonFinite(Exception):
    """Training cannot go on: `updates` in a row were not finite, the first of them in step `first`, counted from 0."""

    def __init__(self, first: int, updates: int):
        super().__init__(first, updates)
        self.first, self.updates = first, updates

    def __str__(self) -> str:
        return (
            f"the loss or the gradient was not finite in {self.updates} updates in a row, from step {self.first + 1} on; none of "
            f"them reached the weights, which are those after step {self.first}"
        )


def guarded(tx: optax.GradientTransformation, *, sigma: float = 6.0) -> optax.GradientTransformationExtraArgs:
    """tx that makes no update from a loss or a gradient norm which is not finite, or is a spike of sigma standard deviations.

    update takes `value`, the loss, and `grad_norm`, both scalars. An update is skipped as a whole: parameters and the state of
    tx stay what they are, bit for bit. A spike is a value above mean + sigma max(std, FLOOR |mean|) of the last WINDOW updates
    that were made; what was skipped, and updates without a gradient, do not enter that window. More than SPIKES in a row
    are a new level: the window begins again with it. sigma 0: spikes are not looked for.
    """
    tx = optax.with_extra_args_support(tx)

    def init(params: Params) -> Guard:
        zero = lambda: jnp.zeros((), jnp.int32)  # noqa: E731 - a buffer each: the step donates them
        return Guard(tx.init(params), jnp.full((2, WINDOW), jnp.nan), zero(), zero(), zero())

    def update(
        grads: Any, state: Guard, params: Params | None = None, *, value: jax.Array, grad_norm: jax.Array, **extra: Any
    ) -> tuple[Any, Guard]:
        _tell(grads, value, grad_norm)
        seen = jnp.stack([value, grad_norm]).astype(jnp.float32)
        finite = jnp.isfinite(seen).all()
        out = finite & _is_spike(state, seen, sigma)
        spike = out & (state.spikes < SPIKES)
        made = finite & ~spike
        updates, inner = tx.update(grads, state.inner, params, value=value, grad_norm=grad_norm, **extra)
        # x + -0.0 is x for every x, also for -0.0
        updates = jax.tree.map(lambda u: jnp.where(made, u, -jnp.zeros_like(u)), updates)
        inner = jax.tree.map(lambda new, old: jnp.where(made, new, old), inner, state.inner)
        begun = jnp.where(out & made, 0, state.made)  # a new level
        window = jnp.where(out & made, jnp.nan, state.window)
        enters = made & (grad_norm > 0)
        window = jnp.where(enters, window.at[:, begun % WINDOW].set(seen), window)
        spikes = jnp.where(spike, state.spikes + 1, jnp.where(made, 0, state.spikes))
        last = jnp.where(finite, jnp.where(spike, SPIKE, MADE), NONFINITE)
        return updates, Guard(inner, window, begun + enters, spikes, last.astype(jnp.int32))

    return optax.GradientTransformationExtraArgs(init, update)


def _is_spike(state: Guard, seen: jax.Array, sigma: float) -> jax.Array:
    """Whether either of seen [2] is far above the window."""
    if sigma <= 0:
        return jnp.asarray(False)
    mean, std = jnp.nanmean(state.window, axis=1), jnp.nanstd(state.window, axis=1)
    limit = mean + sigma * jnp.maximum(std, FLOOR * jnp.abs(mean))
    return (state.made >= LEAST) & (seen > limit).any()


def _tell(grads: Any, value: jax.Array, grad_norm: jax.Array) -> None:
    """Where somebody listens while the step is traced, tell of every update which gradients are finite."""
    if (tell := listener.get()) is not None:
        finite = {path: jnp.isfinite(g).all() for path, g in flatten(grads).items()}
        jax.debug.callback(tell, value, grad_norm, finite)


def metrics(opt_state: Any) -> dict[str, Mean]:
    """guard/skipped and guard/nonfinite of the last update, {} for an optimizer without a guard."""
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=_is_guard) if _is_guard(x)]
    if not found:
        return {}
    share = lambda x: Mean(x.astype(jnp.float32), jnp.float32(1))  # noqa: E731
    return {"guard/skipped": share(found[0].last != MADE), "guard/nonfinite": share(found[0].last == NONFINITE)}


def _is_guard(x: Any) -> bool:
    return isinstance(x, Guard)


class Streak(NamedTuple):
    """Updates in a row that were not finite, and the step, from 0, where they began."""

    first: int = 0
    updates: int = 0


def follow(streak: Streak, begun: int, host: Sequence[dict[str, Mean]], patience: int) -> Streak:
    """The streak behind the steps from `begun` on, whose metrics are on the host; it ends the walk when it is `patience` long."""
    for step, metrics in enumerate(host, begun):
        bad = metrics.get("guard/nonfinite")
        if bad is None or bad.total < bad.count:
            streak = Streak()
        else:
            streak = Streak(streak.first if streak.updates else step, streak.updates + int(bad.total))
        if streak.updates >= patience:
            break
    return streak
