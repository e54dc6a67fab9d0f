"""Intervals and tests: what stands beside every number that a study reports."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np


class Interval(NamedTuple):
    """An estimate with a confidence interval, and the number of values it rests on; nan bounds: there are too few."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


def mean_interval(values: Any, level: float = 0.95) -> Interval:
    """The mean of values [n], one a seed, with Student's t interval; n = 1 gives nan bounds, n = 0 nan altogether."""
    values = np.asarray(values, np.float64).reshape(-1)
    n = values.size
    if n < 2:
        return Interval(float(values[0]) if n else math.nan, math.nan, math.nan, n)
    half = t_quantile((1 + level) / 2, n - 1) * values.std(ddof=1) / math.sqrt(n)
    return Interval(float(values.mean()), float(values.mean() - half), float(values.mean() + half), n)


def paired(a: Any, b: Any, level: float = 0.95) -> Interval:
    """The mean of a - b [n] over the same seeds or prompts, with Student's t interval."""
    return mean_interval(np.asarray(a, np.float64) - np.asarray(b, np.float64), level)


def proportion(successes: float, n: int, level: float = 0.95) -> Interval:
    """successes / n with Wilson's interval, which stays inside [0, 1]; halves (ties) are allowed (Wilson, 1927)."""
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    z, p = NormalDist().inv_cdf((1 + level) / 2), successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Interval(p, min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)), n)


def bootstrap(
    statistic: Callable[..., float], *arrays: Any, seed: int = 0, n: int = 1000, level: float = 0.95
) -> Interval:  # fmt: skip
    """statistic(*arrays) with the percentile interval of n resamples of the rows, the same rows of every array.

    Resamples on which the statistic is not a number are left out.
    """
    arrays = tuple(np.asarray(x) for x in arrays)
    rows, rng = len(arrays[0]), np.random.default_rng(seed)
    draws = np.array([statistic(*(x[index] for x in arrays)) for index in rng.integers(0, rows, (n, rows))], np.float64)
    low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(*arrays)), float(low), float(high), rows)


def sign_test(differences: Any) -> float:
    """The two-sided exact sign test: how likely so uneven a split of signs is by chance. Zeros are left out; none left: 1."""
    d = np.asarray(differences, np.float64).reshape(-1)
    up, n = int((d > 0).sum()), int((d != 0).sum())
    tail = sum(math.comb(n, k) for k in range(min(up, n - up) + 1)) / 2**n
    return min(1.0, 2 * tail)


def t_test(differences: Any) -> float:
    """Student's two-sided p that the mean of normal differences [n] is 0; nan where n < 2 or all of them are the same."""
    d = np.asarray(differences, np.float64).reshape(-1)
    spread = d.std(ddof=1) if d.size > 1 else 0.0
    if not spread > 1e-9 * np.abs(d).max(initial=0.0):  # what rounding leaves of equal ones is no spread
        return math.nan
    return 2 * (1 - _t_cdf(float(abs(d.mean()) / (spread / math.sqrt(d.size))), d.size - 1))


def holm(ps: Any) -> list[float]:
    """Holm's adjusted p values of a family of tests, in their order (Holm, 1979): those below 0.05 hold together at 95 %,
    however the tests depend on each other."""
    ps = [float(p) for p in ps]
    adjusted, most = list(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        most = max(most, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = most
    return adjusted


def t_quantile(p: float, df: int) -> float:
    """The p quantile of Student's t with df degrees of freedom, by bisection of its closed form for whole df."""
    if p < 0.5:
        return -t_quantile(1 - p, df)
    low, high = 0.0, 1.0
    while _t_cdf(high, df) < p:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2


def _t_cdf(t: float, df: int) -> float:
    """P(T <= t), t >= 0 (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = (1.0, 0.0) if df % 2 == 0 else (cosine, 0.0)
    for k in range(df % 2, df - 1, 2):
        total += term
        term *= cosine * cosine * (k + 1) / (k + 2)
    inside = sine * total if df % 2 == 0 else 2 / math.pi * (angle + sine * total)
    return (1 + inside) / 2


def logistic(x: Any, y: Any, *, ridge: float = 0.0, weights: Any = None, steps: int = 50) -> np.ndarray:
    """Coefficients [k] of logistic regression of y [n] in [0, 1] on x [n, k], by Newton's method.

    Maximises sum w (y log sigma(x c) + (1 - y) log sigma(-x c)) - ridge / 2 |c|^2; y may be a probability. Directions that the
    data do not determine stay 0; separable data need ridge > 0 to be finite.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    w = np.ones(len(y)) if weights is None else np.asarray(weights, np.float64)

    def value(c: np.ndarray) -> float:
        z = x @ c
        return float(w @ (np.logaddexp(0, z) - y * z) + ridge / 2 * c @ c)

    c = np.zeros(x.shape[1])
    for _ in range(steps):
        p = sigmoid(x @ c)
        slope = x.T @ (w * (y - p)) - ridge * c
        hessian = (x * (w * p * (1 - p)).reshape(-1, 1)).T @ x + ridge * np.eye(len(c))
        step = np.linalg.lstsq(hessian, slope, rcond=1e-10)[0]
        size = 1.0
        while value(c + size * step) > value(c) + 1e-12 and size > 1e-6:  # a full step may overshoot far from the optimum
            size /= 2
        c = c + size * step
        if np.abs(step).max() < 1e-10:
            break
    return c


def sigmoid(x: Any) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow."""
    return np.exp(-np.logaddexp(0, -np.asarray(x, np.float64)))
