"""Many small trainings at once: seeds and scalar hyper-parameters are a leading axis, and one compilation serves all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core.types import Key

StepFn = Callable[[Any, Any, dict[str, jax.Array], Key], tuple[Any, dict[str, jax.Array]]]
ObserveFn = Callable[[Any, Any, dict[str, jax.Array], Key], dict[str, jax.Array]]


def grid(seeds: int, **settings: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(seed index int [runs], {name: [runs]}) of all seeds with every combination of the settings' values, seeds innermost.

    Results of `fit` fold back with `by_setting`.
    """
    names, values = list(settings), [np.asarray(v) for v in settings.values()]
    mesh = np.meshgrid(*values, np.arange(seeds), indexing="ij")
    columns = [m.reshape(-1) for m in mesh]
    return jnp.asarray(columns[-1]), {n: jnp.asarray(c) for n, c in zip(names, columns, strict=False)}


def by_setting(values: np.ndarray, seeds: int) -> np.ndarray:
    """[runs, ...] of a grid -> [settings, seeds, ...]."""
    return values.reshape(-1, seeds, *values.shape[1:])


def take(tree: Any, index: jax.Array) -> Any:
    """The entries `index` of every leaf's leading axis: what each run has of its seed."""
    return jax.tree.map(lambda x: x[index], tree)


def fit(
    step: StepFn, state: Any, data: Any, hyper: dict[str, jax.Array], keys: jax.Array, *, steps: int, every: int = 0,
    observe: ObserveFn | None = None, note: Callable[[int], None] | None = None,
) -> tuple[Any, dict[str, np.ndarray]]:  # fmt: skip
    """Run `steps` steps of all runs and give (the last states, curves {name: [runs, points]}).

    step(state, data, hyper, key) -> (state, {name: scalar}) is one step of one run, observe(state, data, hyper, key) -> {name:
    scalar} looks at one run; state, data, hyper and keys [runs] carry a leading axis of runs, over which both are vmapped. Every
    `every` steps (default: at the end only) the step's metrics are averaged and observe is called, and before the first
    step too, so curves["step"] is 0, every, 2 every, ... and step metrics begin with nan. Keys are folded with the step.
    """
    every = every or steps
    if steps % every:
        raise ValueError(f"steps={steps} is not a multiple of every={every}")

    @partial(jax.jit, donate_argnums=0)
    def advance(state: Any, data: Any, hyper: Any, keys: jax.Array, start: jax.Array) -> Any:
        def one(state, data, hyper, key):
            def body(state, i):
                return step(state, data, hyper, jax.random.fold_in(key, i))

            state, metrics = jax.lax.scan(body, state, start + jnp.arange(every))
            return state, jax.tree.map(lambda m: m.mean(axis=0), metrics)

        return jax.vmap(one)(state, data, hyper, keys)

    @jax.jit
    def look(state: Any, data: Any, hyper: Any, keys: jax.Array, at: jax.Array) -> Any:
        seen = jax.vmap(partial(jax.random.fold_in, data=2**31 - 1))(keys)
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(seen, at)
        return {} if observe is None else jax.vmap(observe)(state, data, hyper, keys)

    state = jax.tree.map(jnp.copy, state)  # the caller's arrays are not donated
    points: list[dict[str, Any]] = [look(state, data, hyper, keys, jnp.int32(0))]
    for start in range(0, steps, every):
        state, metrics = advance(state, data, hyper, keys, jnp.int32(start))
        points.append(jax.device_get({**metrics, **look(state, data, hyper, keys, jnp.int32(start + every))}))
        if note:
            note(start + every)
    runs = keys.shape[0]
    names = points[-1].keys()
    curves = {n: np.stack([np.asarray(p.get(n, np.full(runs, np.nan))) for p in points], axis=1) for n in names}
    curves["step"] = np.tile(np.arange(len(points)) * every, (runs, 1))
    return state, curves
