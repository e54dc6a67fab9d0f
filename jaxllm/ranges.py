"""What the numbers of a recipe can be, whatever else they are: refused beside mistyped names, before jax is imported.

What depends on other settings (heads and widths, batches and meshes) is checked where it is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Bound = tuple[Callable[[float], bool], str]
COUNT: Bound = (lambda x: x >= 1, "1 or more")
FINITE: Bound = (lambda x: 0 <= x < math.inf, "0 or more, and finite")
SIGNED: Bound = (math.isfinite, "finite")
SHARE: Bound = (lambda x: 0 <= x <= 1, "from 0 to 1")
PART: Bound = (lambda x: 0 <= x < 1, "from 0 up to 1, without 1 itself")

# by full name or last part: where recipes share a name it means the same; every other number is FINITE
BOUNDS: dict[str, Bound] = {
    **dict.fromkeys(("steps", "batch_size", "accumulate", "log_every", "keep", "vocab_size", "seeds"), COUNT),
    **dict.fromkeys(("group", "epochs", "minibatches", "samples", "rounds", "sample_batch"), COUNT),
    **dict.fromkeys(("optim.b1", "optim.b2", "data.held_out"), PART),
    **dict.fromkeys(("gamma", "lam", "top_p", "data.density", "data.world_share", "hyper.label_smoothing"), SHARE),
    **dict.fromkeys(("right", "target", "bias", "length_bias", "position_bias", "missing_eos_penalty", "hyper.gamma"), SIGNED),
    "optim.clip_norm": (lambda x: x > 0, "above 0 (inf: nothing is clipped)"),
}
ELSEWHERE = ("mesh.", "model.")  # core/sharding and the models say more about theirs


def mistakes(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """A line for every number among the settings {"optim.lr": 1e-3} that no run can have."""
    said = {name: fault(name, value) for name, value in values.items()}
    return [f"{prefix}{name}={values[name]}: it must be {words}" for name, words in said.items() if words]


def fault(name: str, value: Any) -> str | None:
    """What a number of this setting must be, when it is not; None when it is, or when it is no number."""
    if not isinstance(value, int | float) or isinstance(value, bool) or name.startswith(ELSEWHERE):
        return None
    fits, words = BOUNDS.get(name) or BOUNDS.get(name.rpartition(".")[2]) or FINITE
    return None if fits(value) else words
