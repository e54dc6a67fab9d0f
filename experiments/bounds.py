"""What the numbers of a recipe can be, whatever else they are: said all at once, before anything is compiled."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from jaxllm.core.types import UserError
from jaxllm.report.files import flatten

Bound = tuple[Callable[[float], bool], str]
COUNT: Bound = (lambda x: x >= 1, "1 or more")
AMOUNT: Bound = (lambda x: x >= 0, "0 or more")
FINITE: Bound = (lambda x: 0 <= x < math.inf, "0 or more, and finite")
SHARE: Bound = (lambda x: 0 <= x <= 1, "from 0 to 1")
PART: Bound = (lambda x: 0 <= x < 1, "from 0 up to 1, without 1 itself")

# a recipe has some of these settings, and where it has one it means the same
BOUNDS: dict[str, Bound] = {
    **dict.fromkeys(("batch_size", "accumulate", "log_every", "keep", "group", "epochs", "minibatches", "vocab_size"), COUNT),
    **dict.fromkeys(("steps", "save_every", "save_seconds", "eval_every", "spike_sigma", "watchdog", "kl_coef"), AMOUNT),
    **dict.fromkeys(("max_prompt", "max_new_tokens", "slots", "ptx_coef", "value_coef", "nll_weight", "lora.rank"), AMOUNT),
    **dict.fromkeys(("groups", "beta", "temperature", "data.rows"), AMOUNT),
    **dict.fromkeys(("optim.lr", "optim.warmup", "optim.final", "optim.weight_decay"), FINITE),
    **dict.fromkeys(("optim.b1", "optim.b2", "data.held_out"), PART),
    "optim.clip_norm": (lambda x: x > 0, "above 0 (inf: nothing is clipped)"),
    **dict.fromkeys(("gamma", "lam", "mask_rate"), SHARE),
}


def check(config: Any) -> None:
    """UserError with a line for each number that no run can have."""
    settings = dict(flatten(config.to_dict()))
    wrong = [
        f"config.{name}={settings[name]}: it must be {words}"
        for name, (fits, words) in BOUNDS.items()
        if isinstance(settings.get(name), int | float) and not fits(settings[name])
    ]
    if wrong:
        raise UserError("\n".join(wrong))
