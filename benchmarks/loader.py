"""The train loop on batches of the loader against the same loop on one batch that is already on the device."""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np

from benchmarks.ours import make_model, make_params, optimizer
from benchmarks.shape import Shape
from jaxllm.core import sharding
from jaxllm.data.loader import make_loader
from jaxllm.losses import lm
from jaxllm.train import loop
from jaxllm.train.step import init_state, make_train_step

ROWS = 4096  # of the data: more than one epoch is never read


def columns(shape: Shape) -> dict[str, np.ndarray]:
    """A training set as `data.pack` leaves it: columns [n, l] on the host."""
    tokens = np.random.default_rng(4).integers(0, shape.vocab, (ROWS, shape.length + 1), dtype=np.int32)
    full = (ROWS, shape.length)
    return {
        "tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segments": np.ones(full, np.int32), "mask": np.ones(full, bool)
    }  # fmt: skip


def steps(shape: Shape, rounds: int) -> dict[str, list[float]]:
    """Seconds per step on the resident batch over those on the loader's, in turns, as `experiments.common.fit` runs it."""
    mesh, tx = sharding.make_mesh({"data": 1}), optimizer()
    loader = make_loader(columns(shape), shape.batch, 0)
    step_fn = jax.jit(make_train_step(lm.loss(make_model(shape)), tx), donate_argnums=0)
    state, frozen = sharding.replicate(init_state({"policy": make_params(shape)}, tx), mesh)
    key = jax.random.key(0)

    def loaded(step: int) -> Any:
        return sharding.put_batch(loader.batch(step), mesh)

    resident = loaded(0)

    def seconds(state: Any, batches: Any) -> tuple[Any, float]:
        began, last = time.perf_counter(), int(state.step) + shape.steps
        state = loop.fit(step_fn, state, frozen, batches, key, steps=last, log=lambda step, values: None, log_every=10**9)
        jax.block_until_ready(state)
        return state, time.perf_counter() - began

    found = []
    with sharding.use(mesh):
        for _ in range(rounds + 1):
            state, ours = seconds(state, loaded)
            state, theirs = seconds(state, lambda step: resident)
            found.append(theirs / ours)
    return {"loader/synthetic": found[1:]}
