"""Learning-rate schedules and AdamW, from optax."""

from __future__ import annotations

from typing import Any

import optax

from jaxllm.core.tree import map_paths


def warmup_cosine(lr: float, steps: int, *, warmup: int = 0, final: float = 0.1) -> optax.Schedule:
    """Linear warm-up to lr over `warmup` steps, then a cosine to final * lr at `steps` (arXiv 1608.03983)."""
    warmup = min(warmup, max(steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(
        lr if warmup == 0 else 0.0, lr, warmup_steps=warmup, decay_steps=max(steps, 1), end_value=final * lr
    )


def warmup_linear(lr: float, steps: int, *, warmup: int = 0, final: float = 0.0) -> optax.Schedule:
    """Linear warm-up to lr, then linear decay to final * lr at `steps`."""
    down = optax.linear_schedule(lr, final * lr, max(steps - warmup, 1))
    if warmup == 0:
        return down
    return optax.join_schedules([optax.linear_schedule(0.0, lr, warmup), down], [warmup])


def decayed(params: Any) -> Any:
    """Which leaves weight decay applies to: kernels and embeddings; not norms' scales, not biases."""
    return map_paths(lambda path, _: not path.endswith(("/scale", "/bias")), params)


def adamw(
    schedule: optax.Schedule | float, *, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8, weight_decay: float = 0.1,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:  # fmt: skip
    """Gradient clipping by global norm, then AdamW (arXiv 1711.05101) with the decay mask of `decayed`."""
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed),
    )
