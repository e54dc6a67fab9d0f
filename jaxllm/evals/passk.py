"""pass@k and best-of-n, estimated without bias from more samples than they ask for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from jaxllm.core.types import UserError


def pass_at_k(samples: Any, correct: Any, k: int) -> np.ndarray:
    """1 - C(n - c, k) / C(n, k) for n samples of which c are correct: the chance that one of k is (arXiv 2107.03374, eq. 1).

    n and c are whole numbers [problems] (or scalars); the mean over problems is the score. UserError when k > n.
    """
    n, c = (np.atleast_1d(np.asarray(x, np.int64)) for x in (samples, correct))
    n, c = np.broadcast_arrays(n, c)
    if k < 1 or (n < k).any():
        raise UserError(
            f"pass@{k} needs at least {max(k, 1)} samples of every problem, there are {int(n.min())}: draw more, or lower k"
        )
    if ((c < 0) | (c > n)).any():
        raise UserError(f"{int(c.max())} correct of {int(n.min())} samples: a count of correct samples is outside [0, samples]")
    i = np.arange(k).reshape(1, -1)
    none = np.clip((n - c).reshape(-1, 1) - i, 0, None) / (n.reshape(-1, 1) - i)
    return 1 - none.prod(axis=1)


def best_of_n(proxy: Any, gold: Any, n: int) -> np.ndarray:
    """The expected gold value of the best of n by the proxy, estimated from m >= n samples a prompt: [prompts].

    proxy and gold [prompts, m]. Over all C(m, n) subsets the sample with the i-th lowest proxy is the best in C(i - 1, n - 1)
    of them, so one set of samples serves every n (arXiv 2112.09332); samples with equal proxies share their chances.
    """
    proxy, gold = np.asarray(proxy, np.float64), np.asarray(gold, np.float64)
    m = proxy.shape[1]
    if not 1 <= n <= m:
        raise UserError(f"best-of-{n} needs at least {max(n, 1)} samples of every prompt, there are {m}: draw more, or lower n")
    below = np.array([math.comb(i, n) / math.comb(m, n) for i in range(m + 1)])  # chance that all n are among the i lowest
    ordered = np.sort(proxy, axis=1)
    low = np.stack([np.searchsorted(row, x, "left") for row, x in zip(ordered, proxy, strict=True)])
    high = np.stack([np.searchsorted(row, x, "right") for row, x in zip(ordered, proxy, strict=True)])
    return ((below[high] - below[low]) / (high - low) * gold).sum(axis=1)


def best_of_n_kl(n: Any) -> np.ndarray:
    """log n - (n - 1) / n nats: a bound on KL(best-of-n, its base policy), met when no two samples tie (arXiv 2401.01879)."""
    n = np.asarray(n, np.float64)
    return np.log(n) - (n - 1) / n
