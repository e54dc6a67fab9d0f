"""Ratings of players from battles: Elo as it goes along, and the Bradley-Terry likelihood of all battles at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jaxllm.core.types import UserError
from jaxllm.evals.stats import logistic

SCALE = 400 / np.log(10)  # rating points per unit of log-odds: 400 points are odds of 10 to 1
START = 1000.0


class Battles(NamedTuple):
    """n battles: indices of the two players int [n], and a's outcome [n]: 1 a win, 1/2 a tie, 0 a loss."""

    a: np.ndarray
    b: np.ndarray
    outcome: np.ndarray
    players: int


def battles(a: Any, b: Any, outcome: Any, players: int) -> Battles:
    """Checked battles. UserError on a player outside [0, players), one against itself, or an outcome outside [0, 1]."""
    a, b, outcome = np.asarray(a, int), np.asarray(b, int), np.asarray(outcome, np.float64)
    for bad, what in (
        ((a < 0) | (a >= players) | (b < 0) | (b >= players), f"names a player outside 0..{players - 1}"),
        (a == b, "is a player against itself"),
        (~((outcome >= 0) & (outcome <= 1)), "has an outcome outside [0, 1]"),
    ):
        if bad.any():
            i = int(bad.argmax())
            raise UserError(f"battle {i + 1} (players {a[i]} and {b[i]}, outcome {outcome[i]}) {what}")
    return Battles(a, b, outcome, players)


def elo(battles: Battles, *, k: float = 4.0, start: float = START, orders: Any = None) -> np.ndarray:
    """Online Elo ratings [orders, players] after all battles, taken in each order (int [orders, n]; None: as they stand).

    r_a += k (outcome - 1 / (1 + 10^((r_b - r_a) / 400))), and r_b loses what r_a gains: the sum never changes (Elo, 1978;
    k = 4 is Chatbot Arena's, arXiv 2403.04132).
    """
    orders = np.arange(len(battles.a)).reshape(1, -1) if orders is None else np.asarray(orders)
    ratings = np.full((len(orders), battles.players), float(start))
    rows = np.arange(len(orders))
    for index in orders.T:
        a, b = battles.a[index], battles.b[index]
        gain = k * (battles.outcome[index] - 1 / (1 + 10 ** ((ratings[rows, b] - ratings[rows, a]) / 400)))
        ratings[rows, a] += gain
        ratings[rows, b] -= gain
    return ratings


def shuffles(n: int, count: int, seed: int = 0) -> np.ndarray:
    """Random orders of n battles, int [count, n]."""
    return np.random.default_rng(seed).permuted(np.tile(np.arange(n), (count, 1)), axis=1)


class Fit(NamedTuple):
    """Ratings [players], mean `start`; the covariates' coefficients [c] in log-odds per unit."""

    ratings: np.ndarray
    coefficients: np.ndarray


def bradley_terry(
    battles: Battles, covariates: Any = None, *, weights: Any = None, start: float = START, ridge: float = 1e-6
) -> Fit:  # fmt: skip
    """Maximum-likelihood ratings: P(a beats b) = sigma((r_a - r_b) / SCALE + covariates . coefficients); a tie is half a win.

    covariates [n, c]: what else may decide a battle (position, length, style), a minus b, so that the ratings are those at equal
    covariates (Bradley and Terry, 1952; arXiv 2403.04132; covariates as in Chatbot Arena's style control). The likelihood has no
    order: shuffling changes nothing. The ridge keeps a player who always wins at a finite rating.
    """
    design, outcome, counts = _cells(battles, weights) if covariates is None else _rows(battles, covariates, weights)
    fitted = logistic(design, outcome, ridge=ridge, weights=counts)
    strengths = fitted[: battles.players]
    return Fit(start + SCALE * (strengths - strengths.mean()), fitted[battles.players :])


def _rows(battles: Battles, covariates: Any, weights: Any) -> tuple[np.ndarray, np.ndarray, Any]:
    """A row of the design for each battle."""
    extra = np.asarray(covariates, np.float64).reshape(len(battles.a), -1)
    return np.concatenate([_signs(battles.a, battles.b, battles.players), extra], axis=1), battles.outcome, weights


def _cells(battles: Battles, weights: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A row for each pair that met, with its mean outcome and its count: the likelihood is the same, and small."""
    m = battles.players
    flip = battles.a > battles.b
    cell = np.where(flip, battles.b * m + battles.a, battles.a * m + battles.b)
    outcome = np.where(flip, 1 - battles.outcome, battles.outcome)
    weights = np.ones(len(cell)) if weights is None else np.asarray(weights, np.float64)
    counts = np.bincount(cell, weights, m * m)
    used = np.flatnonzero(counts)
    wins = np.bincount(cell, weights * outcome, m * m)[used]
    return _signs(used // m, used % m, m), wins / counts[used], counts[used]


def _signs(a: np.ndarray, b: np.ndarray, players: int) -> np.ndarray:
    """+1 in column a and -1 in column b of every row."""
    rows, design = np.arange(len(a)), np.zeros((len(a), players))
    design[rows, a], design[rows, b] = 1.0, -1.0
    return design


def bootstrap_ratings(battles: Battles, covariates: Any = None, *, n: int = 200, seed: int = 0, **options: Any) -> np.ndarray:
    """Bradley-Terry ratings of n resamples of the battles: [n, players]."""
    rng, count = np.random.default_rng(seed), len(battles.a)
    draws = rng.multinomial(count, np.full(count, 1 / count), n)
    return np.stack([bradley_terry(battles, covariates, weights=w, **options).ratings for w in draws])


def rating_bounds(draws: Any, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) [players] of bootstrapped ratings [n, players]."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def rank_spread(low: Any, high: Any) -> np.ndarray:
    """The best and the worst rank of each player that the intervals leave open: int [players, 2], 1 is the top.

    Best: one more than the players certainly above it (their low over its high); worst: all but those certainly below it
    (arXiv 2403.04132).
    """
    low, high = np.asarray(low), np.asarray(high)
    above = (low.reshape(1, -1) > high.reshape(-1, 1)).sum(axis=1)
    below = (high.reshape(1, -1) < low.reshape(-1, 1)).sum(axis=1)
    return np.stack([1 + above, len(low) - below], axis=1)


def spread_text(spread: Any) -> list[str]:
    """ "1↔2" for each player, as the leaderboard shows it."""
    return [f"{best}↔{worst}" for best, worst in np.asarray(spread).tolist()]


def relative_gap(a: Any, b: Any) -> np.ndarray:
    """(a - b) / (a + b) of two non-negative columns (lengths, counts of lists), scaled to deviation 1: a style covariate, [n]."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    gap = np.divide(a - b, a + b, out=np.zeros_like(a), where=a + b > 0)
    return gap / max(float(gap.std()), 1e-9)
