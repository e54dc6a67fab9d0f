"""Win rates: plain, of two models against one baseline, and with the effect of length taken out."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxllm.core.types import UserError
from jaxllm.evals.stats import Interval, bootstrap, logistic, paired, proportion, sigmoid


def preferences(scores: Any, baseline: Any, tie: float = 0.0) -> np.ndarray:
    """1 where a prompt's score beats the baseline's, 0 where it loses, 1/2 where they differ by at most `tie`: [n]."""
    gap = np.asarray(scores, np.float64) - np.asarray(baseline, np.float64)
    return np.where(np.abs(gap) <= tie, 0.5, (gap > 0).astype(np.float64))


def win_rate(preference: Any, level: float = 0.95) -> Interval:
    """The mean preference [n] (1 a win, 1/2 a tie, or a judge's probability) with Wilson's interval, cautious with ties."""
    preference = _checked(preference)
    return proportion(float(preference.sum()), preference.size, level)


def win_rate_difference(a: Any, b: Any, level: float = 0.95) -> Interval:
    """The win rate of model a minus that of b, both judged against one baseline on the same prompts [n]."""
    return paired(_checked(a), _checked(b), level)


def _checked(preference: Any) -> np.ndarray:
    preference = np.asarray(preference, np.float64).reshape(-1)
    outside = preference[~((preference >= 0) & (preference <= 1))]
    if outside.size:
        raise UserError(f"a preference of {outside[0]} is outside [0, 1]: give 1 for a win, 0.5 for a tie, 0 for a loss")
    return preference


def length_term(length: Any, baseline_length: Any) -> np.ndarray:
    """tanh((len - len_baseline) / s.d. of the differences): AlpacaEval 2's length feature, [n]; equal lengths give 0."""
    gap = np.asarray(length, np.float64) - np.asarray(baseline_length, np.float64)
    return np.tanh(gap / max(float(gap.std()), 1e-9))


def length_controlled(
    preference: Any, length: Any, baseline_length: Any, difficulty: Any = None, *, ridge: float = 1e-2, resamples: int = 200,
    seed: int = 0,
) -> Interval:  # fmt: skip
    """The win rate that is left at equal lengths, with a bootstrap interval over prompts.

    The judge is modelled as sigma(theta + phi length_term + psi difficulty); the prediction's mean with phi = 0 is the length
    controlled win rate (arXiv 2404.04475; the difficulty of an instruction comes from a fit over many
    models there and is optional here). Swapping the sides gives 1 minus it; a model against itself gets 1/2.
    """
    preference = _checked(preference)
    hard = np.zeros((preference.size, 0)) if difficulty is None else np.asarray(difficulty, np.float64).reshape(-1, 1)
    features = np.column_stack([np.ones(preference.size), length_term(length, baseline_length), hard])

    def rate(y: np.ndarray, x: np.ndarray) -> float:
        c = logistic(x, y, ridge=ridge)
        return float(sigmoid(x @ np.where(np.arange(len(c)) == 1, 0.0, c)).mean())

    return bootstrap(rate, preference, features, seed=seed, n=resamples)
