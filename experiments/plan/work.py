"""Analytic FLOPs of a stage's step."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax

from jaxllm.models import flops


class Work(NamedTuple):
    """A model's pass over [rows, length] tokens. source: inputs of an encoder-decoder; trainable: a pattern, for a model with
    adapters; backward: a pass without gradient has none; head: whether it meets the vocabulary."""

    model: Any
    rows: int
    length: int
    source: int | None = None
    trainable: str = ".*"
    backward: bool = True
    head: bool = True


def flops_of(work: Work) -> float:
    """By the convention of `flops.CONVENTION`; frozen kernels beside adapters have no gradient of their own."""
    config, tokens = work.model.config, work.rows * work.length
    forward = flops.forward_flops(config, work.rows, work.length, work.source)
    forward -= 0.0 if work.head else 2.0 * flops.head_parameters(config) * tokens
    if not work.backward:
        return forward
    adapters = work.model.specs.get("lora", {}) if "lora" in work.trainable else {}
    if not adapters:
        return 3.0 * forward
    low = sum(math.prod(s.shape) for s in jax.tree.leaves(adapters))
    return 3.0 * forward - 2.0 * flops.matmul_parameters(config) * tokens + 6.0 * low * tokens


def tokens_of(work: tuple[Work, ...]) -> int:
    """Tokens that a step trains on."""
    return sum(w.rows * (w.length + (w.source or 0)) for w in work if w.backward)
