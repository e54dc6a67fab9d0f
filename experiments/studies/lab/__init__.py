"""What the studies on the world of token strings share: policies, reward models and steps as pure functions of one seed.

Every function takes the arrays of one seed and is mapped over seeds with jax.vmap, or over seeds and settings with
`train.sweep`. "PPO" here is its clipped loss with the batch's mean as the baseline: strings are too short to need a critic.
"""

from experiments.studies.lab.ground import Ground, gold, ground, kl, pretrain, sample
from experiments.studies.lab.lengths import LengthScale, length_scale, quality, standard_length
from experiments.studies.lab.models import Lab, fresh, make, only, optimizer, rows, start, train
from experiments.studies.lab.preferences import (
    Judge,
    compare,
    pairs,
    proxy,
    raw_score,
    scores,
    shuffled,
    standardised,
    stock,
    train_judge,
    with_reference,
)
from experiments.studies.lab.steps import imitation_step, observe, policy_step, preference_step

__all__ = [
    "Ground", "Judge", "Lab", "LengthScale", "compare", "fresh", "gold", "ground", "imitation_step", "kl", "length_scale", "make",
    "observe", "only", "optimizer", "pairs", "policy_step", "preference_step", "pretrain", "proxy", "quality", "raw_score",
    "rows", "sample", "scores", "shuffled", "standard_length", "standardised", "start", "stock", "train", "train_judge",
    "with_reference",
]  # fmt: skip
