"""Rows of one H200: model FLOPs utilisation of training, and decoding against the rate at which memory is copied.

Elsewhere nothing is measured. FLOPs are those of `models.flops` (causal attention halved, nothing recomputed) over the
datasheet's dense bfloat16 peak. The 8B-shaped row has 8 of its 32 layers, so that float32 weights and moments fit: shapes, and so
the rates, are those of the whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.ceilings import best_copy
from benchmarks.ours import optimizer
from benchmarks.shape import Shape
from jaxllm.core import spec
from jaxllm.generate import decode
from jaxllm.losses import lm
from jaxllm.models import decoder
from jaxllm.models.flops import train_flops
from jaxllm.models.presets import preset
from jaxllm.train import chips
from jaxllm.train.step import init_state, make_train_step

TRAINED = {  # row: (config, batch, length)
    "h200/gpt2_124m_t1024": (preset("gpt2", dtype="bfloat16"), 64, 1024),
    "h200/1b_t4096": (preset("llama3.2-1b", dtype="bfloat16", remat="dots"), 8, 4096),
    "h200/8b_slice_t8192": (preset("llama3.1-8b", dtype="bfloat16", remat="dots", n_layers=8), 4, 8192),
}
DECODED = {"h200/decode_1": 1, "h200/decode_64": 64}  # row: prompts at once
PROMPT, NEW_TOKENS = 128, 256


def here() -> chips.Chip | None:
    """The H200 of this process, or None."""
    chip = chips.of(jax.devices()[0].device_kind) if jax.default_backend() == "gpu" else None
    return chip if chip is not None and chip.name == "H200" else None


def train(shape: Shape, rounds: int) -> dict[str, list[float]]:
    """Model FLOPs utilisation."""
    if (chip := here()) is None:
        return {}
    return {name: [rate / chip.peak for rate in flops_rates(*sizes, rounds)] for name, sizes in TRAINED.items()}


def flops_rates(config: Any, batch: int, length: int, rounds: int, steps: int = 5) -> list[float]:
    """FLOP/s of the train step on random tokens."""
    model, tx = decoder.make(replace(config, max_length=length)), optimizer()
    step = jax.jit(make_train_step(lm.loss(model), tx), donate_argnums=0)
    state, frozen = init_state({"policy": jax.jit(partial(spec.init, model.specs))(jax.random.key(0))}, tx)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch, length + 1), dtype=np.int32)
    full = (batch, length)
    record = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": np.ones(full, np.int32),
        "mask": np.ones(full, bool),
    }
    record = jax.device_put(record)

    def run() -> None:
        nonlocal state
        for _ in range(steps):
            state, _ = step(state, frozen, record, jax.random.key(0))
        jax.block_until_ready(state)

    return [steps * train_flops(model.config, batch, length) / seconds for seconds in timed(run, rounds)]


def decoding(shape: Shape, rounds: int) -> dict[str, list[float]]:
    """Bytes of weights and of the cache's filled slots that each token must read, per second, over the measured copy rate."""
    if here() is None:
        return {}
    config, copied = preset("llama3.2-1b", dtype="bfloat16", max_length=PROMPT + NEW_TOKENS), best_copy(rounds)
    print(f"  memory is copied at {copied / 1e9:,.0f} GB/s", flush=True)
    return {
        name: [rate / copied for rate in byte_rates(config, rows, PROMPT, NEW_TOKENS, rounds)] for name, rows in DECODED.items()
    }


def byte_rates(config: Any, rows: int, prompt: int, new_tokens: int, rounds: int) -> list[float]:
    """Bytes/s of greedy decoding: (weights + keys and values so far) at each step, of its seconds beyond one token's."""
    model = decoder.make(config)
    init = jax.jit(lambda key: jax.tree.map(lambda x: x.astype(config.dtype), spec.init(model.specs, key)))
    params, prompts, lengths = init(jax.random.key(0)), jnp.zeros((rows, prompt), jnp.int32), jnp.full(rows, prompt)

    def seconds(n: int) -> list[float]:
        sample = jax.jit(partial(decode.generate, model, max_new_tokens=n, temperature=0.0))
        return timed(lambda: jax.block_until_ready(sample(params, prompts, lengths, jax.random.key(0))), rounds)

    weights = sum(x.nbytes for x in jax.tree.leaves(params))
    slot = 2 * config.n_layers * config.kv_heads * config.dim_head * jnp.dtype(config.dtype).itemsize
    read = sum(weights + rows * slot * (prompt + i) for i in range(1, new_tokens))
    return [read / (whole - first) for whole, first in zip(seconds(new_tokens), seconds(1), strict=True)]


def timed(run: Callable[[], Any], rounds: int) -> list[float]:
    """Seconds of every round, after one of warm-up."""
    found = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return found[1:]
