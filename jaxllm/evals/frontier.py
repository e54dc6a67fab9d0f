"""The reward-KL frontier: what a method reaches at each distance from its reference."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxllm.evals.stats import Interval, mean_interval


def pareto(kl: Any, reward: Any) -> np.ndarray:
    """Indices of the points [n] that no other beats (more reward at no more KL, or less KL at no less reward), by rising KL."""
    kl, reward = np.asarray(kl, np.float64), np.asarray(reward, np.float64)
    kept: list[int] = []
    for i in np.lexsort((-reward, kl)):
        if not kept or reward[i] > reward[kept[-1]]:
            kept.append(int(i))
    return np.array(kept, int)


def hull(kl: Any, reward: Any, base: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Corners (kl, reward) of the upper concave hull of the points and of the reference, which is at (0, base).

    It is what mixing policies reaches: KL is convex, so a mixture pays at most the mixed KL and gets the mixed reward.
    """
    kl = np.concatenate([[0.0], np.maximum(np.asarray(kl, np.float64), 0.0)])  # an estimated KL may be below 0
    reward = np.concatenate([[base], np.asarray(reward, np.float64)])
    corners: list[int] = []
    for i in pareto(kl, reward):
        while len(corners) > 1 and _below(kl[[*corners[-2:], i]], reward[[*corners[-2:], i]]):
            corners.pop()
        corners.append(int(i))
    return kl[corners], reward[corners]


def _below(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether the middle one of three points lies on or under the line between the others."""
    return (y[1] - y[0]) * (x[2] - x[0]) <= (y[2] - y[0]) * (x[1] - x[0])


def reward_at(kl: Any, reward: Any, at: Any, base: float = 0.0) -> np.ndarray:
    """The hull's height at each KL in `at`; beyond the last corner it stays level: a smaller KL is always allowed."""
    return np.interp(at, *hull(kl, reward, base))


def hull_area(kl: Any, reward: Any, limit: float, base: float = 0.0) -> float:
    """The area between the hull and `base` for KL in [0, limit]: one number for a method's whole curve, in reward x nats."""
    x, y = hull(kl, reward, base)
    at = np.unique(np.concatenate([[0.0, limit], x[x < limit]]))
    height = np.interp(at, x, y) - base
    return float(((height[1:] + height[:-1]) / 2) @ np.diff(at))


def area_interval(curves: Iterable[tuple[Any, Any]], limit: float, base: float = 0.0, level: float = 0.95) -> Interval:
    """The hull area's mean and interval over seeds; curves yields (kl, reward) of each."""
    return mean_interval([hull_area(kl, reward, limit, base) for kl, reward in curves], level)


def curve_band(curves: Iterable[tuple[Any, Any]], at: Any, base: float = 0.0, level: float = 0.95) -> list[Interval]:
    """The hull's height at each KL in `at`, with its interval over seeds: a line and a band to draw."""
    heights = np.stack([reward_at(kl, reward, at, base) for kl, reward in curves])
    return [mean_interval(column, level) for column in heights.T]
