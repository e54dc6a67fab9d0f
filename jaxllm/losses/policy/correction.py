"""What is done about samples before they become a loss: mismatch of sampler and trainer, truncation, tools, length, no signal."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.losses.policy.advantages import _groups


def truncated_importance(logps_old: jax.Array, logps_rollout: jax.Array, cap: float) -> jax.Array:
    """min(pi_old / pi_rollout, cap) [b, l]: the trainer's log-probs of the sampled tokens against those of the sampler.

    The batch's column `importance`, where another engine or precision drew the samples (as TRL's token_truncate). A token
    that the sampler gave no log-prob (nan) has weight 1. No gradient.
    """
    change = jnp.nan_to_num(logps_old - logps_rollout, nan=0.0)
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(jnp.minimum(change, 20.0)), cap))


def without_truncated(mask: jax.Array, stopped: jax.Array) -> jax.Array:
    """The mask without the rows that ran into the length limit (DAPO's overlong filtering); stopped bool [b]."""
    return mask & stopped[:, None]


def sampled_only(mask: jax.Array, observation: jax.Array) -> jax.Array:
    """The mask without the tokens that a tool wrote into the completion; observation bool [b, l], aligned with targets."""
    return mask & ~observation


def overlong_shaping(lengths: jax.Array, max_length: int, buffer: int) -> jax.Array:
    """0 up to max_length - buffer tokens, falling linearly to -1 at max_length (DAPO, arXiv 2503.14476, equation 13). [b] -> [b].

    To be added to the scores; lengths in sampled tokens.
    """
    return jnp.clip((max_length - buffer - lengths) / buffer, -1.0, 0.0)


def keep_informative(scores: jax.Array, group: int, valid: jax.Array | None = None) -> jax.Array:
    """True for groups whose valid scores differ: the others have no gradient (DAPO's dynamic sampling). [b] -> [b / group]."""
    return _groups(scores, group, valid).varied[:, 0]
