"""All arms and seeds of one kind of training at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.studies.lab.models import start
from jaxllm.core.types import Params
from jaxllm.train import sweep


def fit_arms(
    c: Any, tx: Any, step: Callable, look: Callable, data: Any, hyper: dict[str, jax.Array], *, steps: int, every: int
) -> tuple[Params, dict[str, np.ndarray]]:
    """(policies [runs], curves {name: [settings, seeds, points]}) of runs that begin at data["ground"].reference.

    data and hyper have a leading axis of runs, seeds innermost; c has `seeds` and `seed`.
    """
    reference = data["ground"].reference
    runs = len(jax.tree.leaves(reference)[0])
    state = jax.vmap(partial(start, tx))({"policy": reference})
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(c.seed + 1)))(jnp.arange(runs))
    state, curves = sweep.fit(step, state, data, hyper, keys, steps=steps, every=every, observe=look)
    return state.params["policy"], {n: sweep.by_setting(x, c.seeds) for n, x in curves.items()}
