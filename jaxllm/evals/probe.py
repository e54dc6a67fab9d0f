"""Linear probes: what a straight line can read from features that are held fixed."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)  # on squared weights; the best on a fifth of the labelled rows is taken


@partial(jax.jit, static_argnames=("classes", "steps"))
def fit(x: jax.Array, y: jax.Array, penalty: float, classes: int, steps: int = 250) -> tuple[jax.Array, jax.Array]:
    """Multinomial logistic regression of y int [n] on x [n, d], all rows at every step: weights [d, classes], biases."""
    tx = optax.adam(optax.cosine_decay_schedule(0.05, steps))
    start = (jnp.zeros((x.shape[1], classes)), jnp.zeros(classes))

    def loss(params):
        logits = x @ params[0] + params[1][None]
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return nll + penalty * jnp.sum(params[0] ** 2)

    def step(_, carry):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    return jax.lax.fori_loop(0, steps, step, (start, tx.init(start)))[0]


def probe(x: np.ndarray, y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray, classes: int, seeds: int = 3) -> list[float]:
    """Accuracy on test features for each seed, which chooses the rows that are fitted and those that choose the penalty.

    Features [n, d] are scaled to mean 0 and deviation 1 by the labelled rows.
    """
    mean, std = x.mean(axis=0, keepdims=True), x.std(axis=0, keepdims=True) + 1e-6
    x, test_x = (x - mean) / std, (test_x - mean) / std

    def accuracy(params, x, y):
        return float(np.mean((x @ np.asarray(params[0]) + np.asarray(params[1])[None]).argmax(axis=-1) == y))

    found = []
    for seed in range(seeds):
        train, choose = np.split(np.random.default_rng(seed).permutation(len(x)), [len(x) * 4 // 5])
        fitted = [fit(x[train], y[train], penalty, classes) for penalty in PENALTIES]
        best = max(fitted, key=lambda p: accuracy(p, x[choose], y[choose]))
        found.append(accuracy(best, test_x, test_y))
    return found
