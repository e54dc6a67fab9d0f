"""The contender: this library, as its experiments use it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import shape as given
from benchmarks.shape import Shape
from jaxllm.core import sharding, spec
from jaxllm.core.types import Model
from jaxllm.generate import decode
from jaxllm.losses import lm
from jaxllm.models import decoder, flops
from jaxllm.models.presets import preset
from jaxllm.train.guard import guarded
from jaxllm.train.optim import adamw
from jaxllm.train.step import init_state, make_train_step


def make_model(shape: Shape, unroll: bool = True) -> Model:
    """The GPT-2 of the shape. unroll: as configs of CPU size have it, a faster step for a longer compilation."""
    return decoder.make(
        preset(
            "gpt2", vocab_size=shape.vocab, max_length=shape.length, n_layers=shape.layers,
            n_heads=shape.heads, d_model=shape.width, d_ff=4 * shape.width,
            unroll=unroll,
        )
    )  # fmt: skip


def make_params(shape: Shape) -> dict:
    """The given weights as this library's tree."""
    w = given.weights(shape)
    n, d, h = shape.layers, shape.width, shape.heads

    def dense(name: str) -> dict:
        return {"kernel": w[f"{name}_kernel"], "bias": w[f"{name}_bias"]}

    def norm(name: str) -> dict:
        return {"scale": w[f"{name}_scale"], "bias": w[f"{name}_bias"]}

    kernels = np.split(w["qkv_kernel"].reshape(n, d, 3 * h, d // h), 3, axis=2)
    biases = np.split(w["qkv_bias"].reshape(n, 3 * h, d // h), 3, axis=1)
    attention = {k: {"kernel": a, "bias": b} for k, a, b in zip("qkv", kernels, biases, strict=True)}
    attention["o"] = {"kernel": w["out_kernel"].reshape(n, h, d // h, d), "bias": w["out_bias"]}
    layers = {
        "attention_norm": norm("norm1"), "attention": attention,
        "ffn_norm": norm("norm2"), "ffn": {"up": dense("up"), "down": dense("down")},
    }  # fmt: skip
    embed = {"tokens": w["wte"], "positions": w["wpe"]}
    tree = {"embed": embed, "layers": layers, "final_norm": norm("norm")}
    return jax.tree.map(jnp.array, tree)  # copied: the steps donate them


def optimizer() -> Any:
    return adamw(
        given.LEARNING_RATE, b1=given.B1, b2=given.B2, eps=given.EPS, weight_decay=given.WEIGHT_DECAY, clip_norm=given.CLIP_NORM
    )


def train_step(shape: Shape) -> tuple[dict, Callable[[int], None]]:
    """The train step of `experiments.pretrain`."""
    model, tx = make_model(shape), guarded(optimizer())
    step = jax.jit(make_train_step(lm.loss(model), tx), donate_argnums=0)
    state, frozen = init_state({"policy": make_params(shape)}, tx)
    whole = (shape.batch, shape.length)
    segments, mask = np.ones(whole, np.int32), np.ones(whole, bool)
    rng = jax.random.key(0)
    done = 0

    def advance() -> dict:
        nonlocal state, done
        tokens, targets = given.batch(shape, done)
        record = {"tokens": tokens, "targets": targets, "segments": segments, "mask": mask}
        state, metrics = step(state, frozen, record, rng)
        done += 1
        return metrics

    def run(steps: int) -> None:
        for _ in range(steps):
            advance()
        jax.block_until_ready(state)

    losses = [float(advance()["loss"].value()) for _ in range(given.CHECKED_STEPS)]
    return {"parameters": spec.count(model.specs), "losses": losses, "flops": whole_squares(model.config, *whole)}, run


def whole_squares(config: Any, batch: int, length: int) -> float:
    """The FLOPs of a train step with attention's products not halved for causality."""
    dense = 6.0 * flops.matmul_parameters(config) * batch * length
    return dense + 2 * (flops.train_flops(config, batch, length) - dense)


def generate_one_device(shape: Shape) -> tuple[dict, Callable[[int], None]]:
    """Greedy decoding without a stop token on one device, which uses one core: its products are too small to be split."""
    return _generate(shape, devices=1)


def generate(shape: Shape) -> tuple[dict, Callable[[int], None]]:
    """The same with the rows over one simulated device a core (mesh data), as the other side uses every core."""
    devices = max(n for n in range(1, (os.cpu_count() or 1) + 1) if shape.rows % n == 0)
    jax.config.update("jax_num_cpu_devices", devices)
    return _generate(shape, devices)


def _generate(shape: Shape, devices: int) -> tuple[dict, Callable[[int], None]]:
    model = make_model(shape)
    mesh = sharding.make_mesh({"data": devices})
    params, key = sharding.replicate((make_params(shape), jax.random.key(0)), mesh)

    def greedy(params, prompts, lengths, key, row_offset):
        return decode.generate(
            model, params, prompts, lengths, key, max_new_tokens=shape.new_tokens, temperature=0.0, row_offset=row_offset
        ).tokens

    sample = jax.jit(decode.over_data(greedy, mesh) if devices > 1 else greedy)

    def once() -> np.ndarray:
        with sharding.use(mesh):
            lengths = np.full(shape.rows, shape.prompt, np.int32)
            rows = sharding.put_batch({"prompts": np.asarray(given.prompts(shape)), "lengths": lengths}, mesh)
            return np.asarray(sample(params, rows["prompts"], rows["lengths"], key, 0))

    def run(times: int) -> None:
        for _ in range(times):
            once()

    return {"parameters": spec.count(model.specs), "tokens": once().tolist()}, run
