"""Rounds of sample, score, select, train: expert iteration, STaR, and preference learning on fresh pairs.

The functions are given; what a policy is (a run directory, a tree of parameters) is theirs. Selections are pure functions of
scores [p, k], k samples of each of p prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Round(NamedTuple):
    """index from 0; policy: what this round sampled from; trained: what it ended with; chosen: what it trained on; metrics."""

    index: int
    policy: Any
    trained: Any
    chosen: Any
    metrics: dict[str, float]


def rounds(
    policy: Any, n: int, *, sample: Callable[[Any, int], Any], score: Callable[[Any, int], Any],
    select: Callable[[Any, Any, int], tuple[Any, dict[str, float]]], train: Callable[[Any, Any, Any, int], Any],
    report: Callable[[Round], None] = lambda done: None,
) -> list[Round]:  # fmt: skip
    """n rounds from `policy`; every round samples from the policy that the one before it trained.

    sample(policy, index) -> samples; score(samples, index) -> scores; select(samples, scores, index) -> (chosen, metrics);
    train(start, policy, chosen, index) -> the next policy, where start is the very first one: training from it each time is
    STaR (arXiv 2203.14465), from the latest policy is plain expert iteration. A round that chooses nothing (len 0) keeps its
    policy.
    """
    start, done = policy, []
    for index in range(n):
        samples = sample(policy, index)
        chosen, metrics = select(samples, score(samples, index), index)
        trained = train(start, policy, chosen, index) if len(chosen) else policy
        done.append(Round(index, policy, trained, chosen, metrics))
        report(done[-1])
        policy = trained
    return done


# ---- selections for fine-tuning: right bool [p, k], lengths int [p, k] -> bool [p, k], True on what is kept


def every(right: np.ndarray, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """All right samples."""
    return right.copy()


def shortest(right: np.ndarray, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The shortest right sample of each prompt ("right and short"); the first of equals."""
    return _one(right, -lengths.astype(np.float64))


def longest(right: np.ndarray, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The longest right sample of each prompt."""
    return _one(right, lengths.astype(np.float64))


def at_random(right: np.ndarray, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One right sample of each prompt, whichever."""
    return _one(right, rng.random(right.shape))


def unfiltered(right: np.ndarray, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One sample of each prompt, right or wrong: the control, training on one's own samples without any selection."""
    return _one(np.ones_like(right), rng.random(right.shape))


def _one(allowed: np.ndarray, preference: np.ndarray) -> np.ndarray:
    """The most preferred allowed sample of each row that has one."""
    best = np.where(allowed, preference, -np.inf).argmax(axis=1)
    picked = np.arange(allowed.shape[1]).reshape(1, -1) == best.reshape(-1, 1)
    return picked & allowed


# ---- selections for preference learning: scores float [p, k], nan where excluded -> index [p, 2], and which rows have a pair


def best_and_worst(scores: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(columns (best, worst) int [p, 2], use bool [p]): use is False where all valid scores are equal."""
    high = np.where(np.isnan(scores), -np.inf, scores)
    low = np.where(np.isnan(scores), np.inf, scores)
    return np.stack([high.argmax(axis=1), low.argmin(axis=1)], axis=1), high.max(axis=1) > low.min(axis=1)


def best_and_other(scores: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(columns (best, a random other with a lower score) int [p, 2], use bool [p]): Zephyr's pairs (arXiv 2310.16944)."""
    high = np.where(np.isnan(scores), -np.inf, scores)
    lower = np.isfinite(scores) & (high < high.max(axis=1, keepdims=True))
    other = np.where(lower, rng.random(scores.shape), -1.0).argmax(axis=1)
    return np.stack([high.argmax(axis=1), other], axis=1), lower.any(axis=1)


def solved(right: np.ndarray, valid: np.ndarray, lengths: np.ndarray) -> dict[str, float]:
    """accuracy: the right among the valid samples; coverage: prompts with a right one among those with a valid one; lengths.

    All [p, k]; a mean over nothing is nan.
    """
    share = lambda a, b: float(a.sum() / b.sum()) if b.any() else float("nan")  # noqa: E731
    right = right & valid
    return {
        "accuracy": share(right, valid), "coverage": share(right.any(axis=1), valid.any(axis=1)),
        "mean_length": float(lengths.mean()), "mean_right_length": share(lengths * right, right),
    }  # fmt: skip
