"""The optimizers that `config.optim.name` chooses from: (schedule, config.optim) -> optax transformation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxllm.train import optim


def adamw(schedule: Callable, o: Any) -> Any:
    return optim.adamw(schedule, b1=o.b1, b2=o.b2, weight_decay=o.weight_decay, clip_norm=o.clip_norm)


def adafactor(schedule: Callable, o: Any) -> Any:
    return optim.adafactor(schedule, weight_decay=o.weight_decay, clip_norm=o.clip_norm)


def muon(schedule: Callable, o: Any) -> Any:
    return optim.muon(schedule, b1=o.b1, b2=o.b2, weight_decay=o.weight_decay, clip_norm=o.clip_norm)


OPTIMIZERS = {"adamw": adamw, "adafactor": adafactor, "muon": muon}
