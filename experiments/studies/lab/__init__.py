"""What the studies on the world of token strings share: policies, reward models and steps as pure functions of one seed.

Every function takes the arrays of one seed and is mapped over seeds with jax.vmap, or over seeds and settings with
`train.sweep`. "PPO" here is its clipped loss with the batch's mean as the baseline: strings are too short to need a critic.
"""

from experiments.studies.lab.ground import Ground, gold, ground, kl, pretrain, sample
from experiments.studies.lab.models import Lab, fresh, make, only, optimizer, rows, start, train
from experiments.studies.lab.preferences import (
    Judge,
    compare,
    pairs,
    proxy,
    raw_score,
    standardised,
    train_judge,
    with_reference,
)
from experiments.studies.lab.steps import imitation_step, observe, policy_step, preference_step

__all__ = [
    "Ground", "Judge", "Lab", "compare", "fresh", "gold", "ground", "imitation_step", "kl", "make", "observe", "only",
    "optimizer", "pairs", "policy_step", "preference_step", "pretrain", "proxy", "raw_score", "rows", "sample",
    "standardised", "start", "train", "train_judge", "with_reference",
]  # fmt: skip
