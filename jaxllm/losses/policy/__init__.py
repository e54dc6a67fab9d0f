"""Policy gradients: an advantage, a token loss, a normalisation and, where one is wanted, a KL term, each a value of its own.

All arrays are [b, l] aligned with a sequence record's targets unless said otherwise; `mask` is True on the tokens the policy
sampled. Rows of one prompt are neighbours: b = prompts x group.
"""

from jaxllm.losses.policy.advantages import (
    baseline,
    dr_grpo,
    gae,
    group_metrics,
    grpo,
    kl_penalised_rewards,
    last_of,
    reinforce_pp,
    remax,
    rloo,
    running_mean,
    whiten,
)
from jaxllm.losses.policy.builders import group_loss, loss, with_ptx
from jaxllm.losses.policy.correction import (
    keep_informative,
    overlong_shaping,
    sampled_only,
    truncated_importance,
    without_truncated,
)
from jaxllm.losses.policy.kl import AdaptiveKL, adapt, k1, k2, k3
from jaxllm.losses.policy.normalise import constant, sequence_mean, spread, token_mean
from jaxllm.losses.policy.ratio import cispo, clipped, dual_clip, gspo, ppo_policy, ppo_value, reinforce

__all__ = [
    "AdaptiveKL", "adapt", "baseline", "cispo", "clipped", "constant", "dr_grpo", "dual_clip", "gae", "group_loss",
    "group_metrics", "grpo", "gspo", "k1", "k2", "k3", "keep_informative", "kl_penalised_rewards", "last_of", "loss",
    "overlong_shaping", "ppo_policy", "ppo_value", "reinforce", "reinforce_pp", "remax", "rloo", "running_mean",
    "sampled_only", "sequence_mean", "spread", "token_mean", "truncated_importance", "whiten", "with_ptx", "without_truncated",
]  # fmt: skip
