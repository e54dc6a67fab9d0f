"""Experiments that train with another one: what they hand to it, and which of a life cycle's stages is looked at."""

from __future__ import annotations

from typing import Any

from jaxllm import settings
from jaxllm.core.types import UserError

SAMPLED = ("pairs", "best_of_n")  # which train nothing
KNOWN = (
    "pretrain", "sft", "reward", "dpo", "kto", "ppo", "grpo", "moe", "lstm", "mlm", "t5", "imagegpt", "flamingo", "classify",
    *SAMPLED,
)  # fmt: skip
# experiment -> (the one that it trains with, {its setting: the outer one})
PAIRS = {"loss": "loss", "beta": "beta", "nll_weight": "nll_weight", "optim.lr": "lr", "batch_size": "batch_size"}
INNER = {
    "iterative_dpo": ("dpo", PAIRS), "rlaif": ("dpo", PAIRS),
    "rejection_sampling": ("sft", {"optim.lr": "lr", "batch_size": "batch_size"}),
    "quickstart": ("ppo", {}),
}  # fmt: skip


def of(experiment: str, config: Any) -> tuple[str, Any, str]:
    """(experiment, config, a line that says so) whose step is examined: its own, or that of the one it trains with."""
    if experiment not in INNER:
        if experiment not in KNOWN:
            near = settings.nearest(experiment, [*KNOWN, *INNER])
            hint = f"did you mean {near}? " if near else ""
            raise UserError(f"--experiment={experiment}: {hint}Choose one of {', '.join([*KNOWN, *INNER])}")
        return experiment, config, ""
    name, shared = INNER[experiment]
    own = settings.load_config(settings.config_path(name))
    with own.unlocked():
        own.update_from_flattened_dict({ours: config[theirs] for ours, theirs in shared.items()})
        own.update({n: config[n] for n in ("seed", "init") if n in config and n in own})
    given = ", ".join(f"{n}={config[theirs]}" for n, theirs in shared.items())
    return name, own, f"{experiment} trains with experiments.{name}: that is examined{f', with {given}' if given else ''}"
