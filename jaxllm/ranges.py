"""Which numbers a setting may be: what no recipe can mean is refused beside mistyped names, before jax is imported.

What depends on other settings (heads and widths, batches and meshes) is checked where it is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# by full name, or by last part
COUNTS = {
    "steps", "batch_size", "accumulate", "log_every", "keep", "epochs", "minibatches", "group", "samples", "rounds", "seeds",
    "vocab_size", "sample_batch",
}  # fmt: skip
BELOW_ONE = {"optim.b1", "optim.b2"}  # averages over a past that is forgotten
SHARES = {"top_p", "data.world_share", "mask_rate", "data.density", "hyper.label_smoothing"}
SIGNED = {"right", "target", "bias", "length_bias", "position_bias", "missing_eos_penalty", "hyper.gamma"}
FREE = ("mesh", "model")  # core/sharding and the models say more about theirs


def mistakes(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """A line for every number among the settings {"optim.lr": 1e-3} that cannot be meant."""
    said = {name: said for name, value in values.items() if (said := fault(name, value))}
    return [f"{prefix}{name}={values[name]}: {why}" for name, why in said.items()]


def fault(name: str, value: Any) -> str | None:
    """What is wrong with a number for this setting; None when nothing is, or when it is no number."""
    if not isinstance(value, int | float) or isinstance(value, bool) or name.startswith(FREE):
        return None
    has = {name, name.rpartition(".")[2]}
    if not math.isfinite(value):
        return "must be a finite number"
    if has & COUNTS and value < 1:
        return "must be at least 1"
    if has & BELOW_ONE and not 0 <= value < 1:
        return "must be at least 0 and below 1"
    if has & SHARES and not 0 <= value <= 1:
        return "a share from 0 to 1 is needed"
    if value < 0 and not has & SIGNED:
        return "must not be negative"
    return None
