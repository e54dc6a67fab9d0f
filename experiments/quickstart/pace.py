"""How long this machine takes, and how many steps that buys."""

from __future__ import annotations

import statistics
import time

import jax
import numpy as np

from jaxllm.core import spec
from jaxllm.losses import lm
from jaxllm.models import decoder, presets
from jaxllm.train import optim
from jaxllm.train.step import init_state, make_train_step

PRETRAIN = (600, 900)  # least steps with which the claims held on every seed tried, and the most that are useful
SFT = (1000, 2600)
# Everything else, in units of one train step of 32 x 64 tokens, plus seconds of start-up and compilation
OTHER_UNITS = 1500.0
FIXED_SECONDS = 60.0


def measure(batch: int = 32, length: int = 64, repeats: int = 9) -> float:
    """Median seconds of one train step of the quickstart's model, after compilation."""
    config = presets.preset("tiny")
    model = decoder.make(config)
    tx = optim.adamw(1e-3)
    state, frozen = init_state({"policy": spec.init(model.specs, jax.random.key(0))}, tx)
    step = jax.jit(make_train_step(lm.loss(model), tx), donate_argnums=0)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (batch, length), dtype=np.int32)
    rows = {"tokens": ids, "targets": ids, "segments": np.ones_like(ids), "mask": ids >= 0}
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        state, metrics = step(state, frozen, rows, jax.random.key(0))
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def choose(unit: float, budget: float, pretrain: int = 0, sft: int = 0) -> dict:
    """Steps for a budget in seconds when one train step takes `unit`; given (non-zero) counts stay as they are.

    Time beyond the least that the claims need goes to SFT first, where exact match still rises, then to pretraining.
    """
    spare = (budget - FIXED_SECONDS) / unit - OTHER_UNITS
    pretrain_steps = pretrain or PRETRAIN[0]
    sft_steps = sft or int(np.clip(spare - pretrain_steps, *SFT)) // 50 * 50
    if not pretrain:
        pretrain_steps = int(np.clip(spare - sft_steps, *PRETRAIN)) // 50 * 50
    return {"pretrain_steps": pretrain_steps, "sft_steps": sft_steps, "step_seconds": round(unit, 5)}


def seconds(unit: float, pretrain: int, sft: int) -> float:
    """The whole quickstart, estimated."""
    return FIXED_SECONDS + unit * (OTHER_UNITS + pretrain + sft)
