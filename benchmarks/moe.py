"""A mixture of experts against the dense model of equal active FLOPs: the train step of each, as the experiments use it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import jax
import numpy as np

from benchmarks import shape as given
from benchmarks.shape import Shape
from jaxllm.core import spec, tree
from jaxllm.losses import lm
from jaxllm.models import decoder
from jaxllm.models.moe import MoEConfig
from jaxllm.models.presets import preset
from jaxllm.train.optim import adamw
from jaxllm.train.step import init_state, make_train_step

EXPERTS, TOP_K = 8, 2
ROUTER = {"load_balance": 1e-2, "router_z": 1e-3}
TIMES = 2  # the tokens of a step, over those of the other benchmarks: experts see TOP_K / EXPERTS of them


def sparse(shape: Shape) -> tuple[dict, Callable[[int], None]]:
    """Dropless experts, each 1 / TOP_K as wide as the dense network."""
    return _train_step(shape, MoEConfig(EXPERTS, TOP_K, 4 * shape.width // TOP_K))


def dense(shape: Shape) -> tuple[dict, Callable[[int], None]]:
    """The same decoder without experts."""
    return _train_step(shape, None)


def _train_step(shape: Shape, moe: MoEConfig | None) -> tuple[dict, Callable[[int], None]]:
    shape = replace(shape, batch=TIMES * shape.batch)
    config = preset(
        "gpt2", vocab_size=shape.vocab, max_length=shape.length, n_layers=shape.layers, n_heads=shape.heads,
        d_model=shape.width, d_ff=4 * shape.width, bias=False, moe=moe,
        unroll=True,  # on a CPU both are fastest so
    )  # fmt: skip
    model, tx = decoder.make(config), adamw(given.LEARNING_RATE)
    step = jax.jit(make_train_step(lm.loss(model, router=ROUTER), tx), donate_argnums=0)
    state, frozen = init_state({"policy": jax.jit(lambda key: spec.init(model.specs, key))(jax.random.key(0))}, tx)
    whole = (shape.batch, shape.length)
    segments, mask = np.ones(whole, np.int32), np.ones(whole, bool)
    done = 0

    def advance() -> dict:
        nonlocal state, done
        tokens, targets = given.batch(shape, done)
        record = {"tokens": tokens, "targets": targets, "segments": segments, "mask": mask}
        state, metrics = step(state, frozen, record, jax.random.key(0))
        done += 1
        return metrics

    def run(steps: int) -> None:
        for _ in range(steps):
            advance()
        jax.block_until_ready(state)

    first = advance()
    assert np.isfinite(float(first["loss"].value())), "the loss of the first step is not a number"
    tokens = shape.batch * shape.length
    return {"parameters": spec.count(model.specs), "trained": tokens, "flops": 6 * active_count(model.specs) * tokens}, run


def active_count(specs: spec.SpecTree) -> int:
    """The parameters that one token is multiplied with: kernels, of the experts' the share TOP_K / EXPERTS, and the head's."""
    sizes = {path: (math.prod(s.shape), s.axes) for path, s in tree.flatten(specs).items()}
    used = {path: size * TOP_K // EXPERTS if "experts" in axes else size for path, (size, axes) in sizes.items()}
    return sum(size for path, size in used.items() if path.endswith(("/kernel", "embed/tokens")))
