"""An experiment's own model, data, loss and step, taken where its `main` hands them to `common.fit`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import common, completions, teach
from experiments.doctor.small import FRESH, made_up
from experiments.plan.plan import changed
from jaxllm.core import tree
from jaxllm.core.types import TrainState


class Update(NamedTuple):
    """One call of `common.jit_step`: the loss, copies of what the step was first called with, and in `made` the step."""

    loss: Callable
    first: dict[str, Any]
    made: list[Callable]


class Sampled(NamedTuple):
    """One sampler: its model, tokenizer and options as they were asked for, and the first call's params and record."""

    model: Any
    tokenizer: Any
    options: dict[str, Any]
    first: dict[str, Any]


class Seen(NamedTuple):
    """What reached `common.fit`, and what was made on the way to it."""

    config: Any
    experiment: str
    fit: dict[str, Any]
    updates: list[Update]
    samplers: list[Sampled]

    @property
    def params(self) -> Any:
        """{root: params}, whole."""
        return tree.merge(self.fit["state"].params, self.fit["frozen"])

    @property
    def root(self) -> str:
        """The root that is trained, the policy where there are several."""
        roots = sorted(self.fit["state"].params)
        return "policy" if "policy" in roots else roots[0]


def copied(x: Any) -> Any:
    """Arrays that no one donates."""
    return jax.tree.map(jnp.copy, x)


def sampled(seen: Seen) -> Seen:
    """Of an experiment that has drawn and not trained: its samples as columns, their policy as the state."""
    one = next(s for s in seen.samplers if s.first)
    state = TrainState(jnp.int32(0), {"policy": one.first["params"]}, None)
    given = {"model": one.model, "tokenizer": one.tokenizer, "columns": one.first["record"], "state": state, "frozen": {}}
    return seen._replace(fit=given)


@contextlib.contextmanager
def stand_ins(**functions: Any) -> Iterator[None]:
    """Functions of `common` (and the sampler of `completions`) replaced in a block: every experiment calls them there."""
    places = {name: completions if name == "sampler" else common for name in functions}
    before = {name: getattr(place, name) for name, place in places.items()}
    for name, place in places.items():
        setattr(place, name, functions[name])
    try:
        yield
    finally:
        for name, place in places.items():
            setattr(place, name, before[name])


def traced(tree_: Any) -> bool:
    """Whether a stage asks for shapes alone, as for the memory of an update on a rollout."""
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree_))


@contextlib.contextmanager
def watched(experiment: str, examine: Callable[[Seen, Callable], Any]) -> Iterator[Seen]:
    """A block in which `main` of an experiment runs up to its `fit`, where examine(seen, the real fit) takes its place.

    Runs that it starts from, where none is given, are fresh models at step 0: their `fit` only saves. Pairs that it would
    collect first are made up.
    """
    real = {name: getattr(common, name) for name in ("fit", "jit_step", "need")}
    sampler, inside = completions.sampler, []
    seen = Seen(None, experiment, {}, [], [])

    def fit(config: Any, run: Any, **given: Any) -> Any:
        if inside:
            return real["fit"](changed(config, {"steps": 0, "eval_every": 0}), run, **{**given, "evaluate": None})
        return examine(seen._replace(config=config, fit={**given, "run": run}), real["fit"])

    def jit_step(loss: Any, tx: Any, state: Any, accumulate: int) -> Any:
        step = real["jit_step"](loss, tx, state, accumulate)
        if inside:
            return step
        update = Update(teach.at("loss", loss), {}, [])
        seen.updates.append(update)

        def first(state: Any, frozen: Any, batch: Any, key: Any) -> Any:
            if not update.first:
                update.first.update(params=tree.merge(copied(state.params), frozen), batch=copied(batch), key=key)
            return step(state, frozen, batch, key)

        update.made.append(first)
        return first

    def drawn(model: Any, tokenizer: Any, **options: Any) -> Any:
        sample, one = sampler(model, tokenizer, **options), Sampled(model, tokenizer, options, {})
        seen.samplers.append(one)

        def first(params: Any, *rest: Any) -> Any:
            out = sample(params, *rest)
            if not (one.first or inside or traced(out)):
                one.first.update(params=params, record=out[1])
            return out

        return first

    def need(stage: str, given: str, config: Any, run: Any, **overrides: Any) -> str:
        if given:
            return given
        if stage == "pairs":
            return made_up(run.path("pairs"), config.seed)
        inside.append(stage)
        try:
            return real["need"](stage, "", config, run, **{**FRESH.get(stage, {}), **overrides})
        finally:
            inside.pop()

    with stand_ins(fit=fit, jit_step=jit_step, sampler=drawn, need=need):
        yield seen
