"""What a reward model's scores are worth: accuracy, calibration, order, and what length alone would have got."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxllm.evals.stats import Interval, proportion, sigmoid


def accuracy(chosen: Any, rejected: Any) -> Interval:
    """How often the chosen side's score is the higher; a tie is half right."""
    gap = np.asarray(chosen, np.float64) - np.asarray(rejected, np.float64)
    return proportion(float((gap > 0).sum() + 0.5 * (gap == 0).sum()), gap.size)


def length_only(chosen_length: Any, rejected_length: Any) -> Interval:
    """The accuracy of length alone, read in whichever direction the pairs favour: the baseline at its best."""
    return max(accuracy(chosen_length, rejected_length), accuracy(rejected_length, chosen_length), key=lambda x: x.mean)


def calibration(margin: Any, bins: int = 10) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(predicted, observed, counts) of the bins in use: sigmoid(|margin|) against how often the annotator agreed.

    margin [n] = r(chosen) - r(rejected).
    """
    margin = np.asarray(margin)
    predicted = 1 / (1 + np.exp(-np.abs(margin)))
    edges = np.linspace(0.5, 1.0, bins + 1)
    index = np.clip(np.digitize(predicted, edges) - 1, 0, bins - 1)
    used = [i for i in range(bins) if (index == i).any()]
    pick = lambda x: np.array([x[index == i].mean() for i in used])  # noqa: E731
    return pick(predicted), pick((margin > 0).astype(float)), np.array([(index == i).sum() for i in used])


def calibration_error(margin: Any, bins: int = 10) -> float:
    """Expected calibration error: the mean of |predicted - observed| over the bins, by their counts (arXiv 1706.04599)."""
    predicted, observed, counts = calibration(margin, bins)
    return float(np.abs(predicted - observed) @ counts / counts.sum())


def spearman(x: Any, y: Any) -> float:
    """Spearman's rank correlation of x and y [n], ties at their mean rank; nan when one of them is constant."""
    a, b = (ranks(v) - (len(np.asarray(v)) + 1) / 2 for v in (x, y))
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else float("nan")


def ranks(x: Any) -> np.ndarray:
    """1 for the lowest of x [n], ties at their mean rank."""
    x = np.asarray(x)
    ordered = np.sort(x)
    return (np.searchsorted(ordered, x, "left") + np.searchsorted(ordered, x, "right") + 1) / 2


def noise_ceiling(gap: Any) -> float:
    """The best accuracy that any model can have on labels drawn as Bernoulli(sigma(gap)), gap [n]: mean of sigma(|gap|)."""
    return float(sigmoid(np.abs(np.asarray(gap, np.float64))).mean())
