"""The first steps of a run, taken once: what the checks of losses and gradients look at."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.doctor.capture import Seen, Update, copied
from experiments.doctor.numbers import ragged
from jaxllm.core import sharding, tree
from jaxllm.core.types import TrainState, UserError
from jaxllm.data.loader import make_loader
from jaxllm.train import gates
from jaxllm.train.loop import fetch
from jaxllm.train.step import make_train_step

STEPS = 3  # at most, until the gates of a run have decided: the first of a warm-up has a learning rate of 0


class Subject(NamedTuple):
    """update: the loss; first: the params, batch and key that it was first called with; value: it, jitted; metrics: the first
    step's; gates: {name: the line of one that has passed, or its UserError}."""

    seen: Seen
    update: Update
    first: dict[str, Any]
    value: Callable
    metrics: dict[str, float]
    gates: dict[str, Any]

    @property
    def params(self) -> Any:
        return self.first["params"]

    @property
    def key(self) -> Any:
        return self.first["key"]

    @property
    def batch(self) -> Any:
        """The batch; where every advantage is 0, because all rewards were alike, with random ones."""
        batch = self.first["batch"]
        if not isinstance(batch, dict) or "advantages" not in batch or np.asarray(batch["advantages"]).any():
            return batch
        return batch | {"advantages": jax.random.normal(jax.random.key(1), batch["advantages"].shape)}

    @property
    def uneven(self) -> Any:
        """The batch with masks of unlike sizes."""
        return ragged(self.batch)


def first_batch(seen: Seen) -> Any:
    """The batch of step 1, on the devices."""
    loader = make_loader(seen.fit["columns"], seen.config.batch_size, seen.config.seed)
    return sharding.put_batch(loader.batch(0), seen.fit["mesh"])


def begun(seen: Seen, stepping: bool = True) -> Subject:
    """Up to three steps of a copy of the run, with its own gates, none of which stops it.

    Where stepping is False and the columns are the loss's batch, no step is compiled: only the loss is looked at.
    """
    update = next((u for u in seen.updates if seen.fit["step_fn"] in u.made), None)
    if not stepping and update is not None:
        key = jax.random.key(seen.config.seed)
        return subject_of(seen, update, {"params": seen.params, "batch": first_batch(seen), "key": key}, {}, {})
    return stepped(seen)


def subject_of(seen: Seen, update: Update, first: dict[str, Any], metrics: dict, outcome: dict) -> Subject:
    value = jax.jit(lambda params, batch: update.loss(params, batch, first["key"]))
    return Subject(seen, update, first, value, metrics, outcome)


def stepped(seen: Seen) -> Subject:
    fit, outcome = seen.fit, {}
    asked = (gates.moved(),) if fit.get("checks") is None else fit["checks"]
    names = [*(f"start {i}" for i in range(len(asked) - 1)), "moved"]

    def kept(name: str, gate: gates.Gate) -> gates.Gate:
        def call(step: gates.Seen) -> str | None:
            try:
                outcome[name] = gate(step)
            except UserError as error:
                outcome[name] = error
            return None if outcome[name] is None else ""

        return call

    dtype = getattr(fit["model"].config, "dtype", "") or "float32"
    watched = [kept(name, gate) for name, gate in zip(names, asked, strict=True)]
    guarded = gates.guarded(fit["step_fn"], watched, lr=fit["schedule"], dtype=dtype)
    state, batch, metrics = copied(fit["state"]), first_batch(seen), {}
    for _ in range(STEPS):
        state, values = guarded(state, fit["frozen"], batch, jax.random.key(seen.config.seed))
        metrics = metrics or fetch([values])
        if len(outcome) == len(names) and None not in outcome.values():
            break
    update = next(u for u in seen.updates if u.first)
    return subject_of(seen, update, dict(update.first), metrics, outcome)


def parts(s: Subject, params: Any = None) -> tuple[Any, Any]:
    """(what is trained, the rest) of the loss's params."""
    flat, moving = tree.flatten(s.params if params is None else params), tree.flatten(s.seen.fit["state"].params)
    chosen = {p: x for p, x in flat.items() if p in moving}
    return tree.unflatten(chosen), tree.unflatten({p: x for p, x in flat.items() if p not in moving})


def gradients(s: Subject, params: Any, batch: Any, accumulate: int = 1) -> Any:
    """The gradients that the train step would hand to the optimizer: {path: array} of what is trained."""
    chosen, rest = parts(s, params)
    state = TrainState(jnp.int32(0), chosen, READ.init(chosen))
    return tree.flatten(reader(s.update.loss, accumulate)(state, rest, batch, s.key)[0].opt_state)


# an optimizer that moves nothing, and whose state is the last gradient
READ = optax.GradientTransformation(
    lambda p: jax.tree.map(jnp.zeros_like, p), lambda g, state, p=None: (jax.tree.map(jnp.zeros_like, g), g)
)


@functools.lru_cache(maxsize=4)
def reader(loss: Callable, accumulate: int) -> Callable:
    """The train step with it: compiled once for batches of one shape."""
    return jax.jit(make_train_step(loss, READ, accumulate=accumulate))
