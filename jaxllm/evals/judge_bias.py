"""Probes of a pairwise judge: does it favour a position or a length, and what swapping the sides repairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxllm.evals.stats import Interval, bootstrap, logistic, mean_interval, proportion

Judge = Callable[[Sequence[Any], Sequence[Any], Sequence[Any]], Any]
"""(prompts, shown first, shown second) -> preference for the first [n]: 1, 1/2, 0 or a probability."""


class Swapped(NamedTuple):
    """The judge's preference for the side shown first, [n]: with a first, and with b first."""

    a_first: np.ndarray
    b_first: np.ndarray


def both_orders(judge: Judge, prompts: Sequence[Any], a: Sequence[Any], b: Sequence[Any]) -> Swapped:
    """Every pair judged twice, with its sides swapped the second time."""
    return Swapped(np.asarray(judge(prompts, a, b), np.float64), np.asarray(judge(prompts, b, a), np.float64))


def swap_average(verdicts: Swapped) -> np.ndarray:
    """The preference for a, [n], averaged over both orders: an additive position bias cancels exactly (arXiv 2306.05685)."""
    return (verdicts.a_first + 1 - verdicts.b_first) / 2


def position_bias(verdicts: Swapped, level: float = 0.95) -> Interval:
    """How much more often than 1/2 the side shown first wins, whichever it is: 0 for a fair judge, at most 1/2."""
    return mean_interval((verdicts.a_first + verdicts.b_first) / 2 - 0.5, level)


def consistency(verdicts: Swapped) -> Interval:
    """How often both orders name the same winner (or both a tie)."""
    same = np.sign(verdicts.a_first - 0.5) == np.sign(0.5 - verdicts.b_first)
    return proportion(float(same.sum()), same.size)


def length_coefficient(
    preference: Any, length_gap: Any, quality_gap: Any = None, *, resamples: int = 200, seed: int = 0
) -> Interval:  # fmt: skip
    """The log-odds that one unit of length gap adds to a preference [n] at equal quality, with a bootstrap interval.

    Logistic regression on the gaps (a minus b) without a constant: the sides' names are arbitrary. Without quality_gap, better
    answers that happen to be longer count as bias too.
    """
    columns = [np.asarray(x, np.float64) for x in (length_gap, quality_gap) if x is not None]
    fit = lambda y, x: float(logistic(x, y, ridge=1e-6)[0])  # noqa: E731
    return bootstrap(fit, np.asarray(preference, np.float64), np.column_stack(columns), seed=seed, n=resamples)


def padding_bias(judge: Judge, prompts: Sequence[Any], answers: Sequence[Any], padded: Sequence[Any]) -> Interval:
    """How much more often than 1/2 an answer loses to itself with filler added, averaged over both orders: 0 is fair."""
    return mean_interval(swap_average(both_orders(judge, prompts, padded, answers)) - 0.5)
