"""Best-of-n from one set of strings a seed: what it is worth, and how far it is from the policy that drew them."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxllm.evals import passk


def best_of(proxy: Any, gold: Any, sizes: Any) -> dict[str, np.ndarray]:
    """{kl, proxy, gold: [seeds, sizes]; bound: [sizes]} of best-of-n by the proxy, from m strings a seed: [seeds, m].

    Worth is the unbiased estimate over all subsets of n; KL is the plug-in estimate (`plug_in_kl`).
    """
    proxy, gold = np.asarray(proxy, np.float64), np.asarray(gold, np.float64)
    worth = {
        name: np.stack([passk.best_of_n(proxy, x, n) for n in sizes], axis=1) for name, x in (("proxy", proxy), ("gold", gold))
    }
    kl = np.array([[plug_in_kl(row, n) for n in sizes] for row in proxy])
    return {"kl": kl, "bound": passk.best_of_n_kl(sizes), **worth}


def plug_in_kl(proxy: np.ndarray, n: int) -> float:
    """KL(best-of-n of the empirical distribution of m scores [m], that distribution) in nats, exactly.

    A string drawn twice, or two that tie, are one outcome of mass c / m, and the best of n is in it with probability F^n - F'^n
    (F and F' the distribution function at and below it): ties are what puts KL below log n - (n - 1) / n.
    """
    _, counts = np.unique(proxy, return_counts=True)
    upto = np.cumsum(counts) / len(proxy)
    mass = counts / len(proxy)
    chosen = upto**n - (upto - mass).clip(0) ** n
    kept = chosen > 0
    return float(np.sum(chosen[kept] * np.log(chosen[kept] / mass[kept])))


def drawn_kl(proxy: np.ndarray, logps: np.ndarray, n: int) -> float:
    """KL(best-of-n, the policy) in nats from strings actually chosen: the best of each group of n from one half of m [m].

    A chosen string's log-ratio takes the policy's own probability of it (logps [m]) and the distribution function of scores
    below it from the other half. Unlike the plug-in estimate it may come out above the bound, by chance.
    """
    half = len(proxy) // 2
    groups, others = half // n, np.sort(proxy[half:])
    rows = np.arange(groups * n).reshape(groups, n)
    best = rows[np.arange(groups), proxy[rows].argmax(axis=1)]
    below = (np.searchsorted(others, proxy[best], "left") + 0.5) / (len(others) + 1)
    mass = np.exp(np.asarray(logps, np.float64)[best])
    # log((F' + p)^n - F'^n) - log p, in terms that survive a p of 1e-12
    upto = np.minimum(below + mass, 1.0)
    ratio = n * np.log(upto) + np.log(-np.expm1(-n * np.log1p(mass / below))) - np.log(mass)
    return float(ratio.mean())
