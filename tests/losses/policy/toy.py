"""Every sequence of length 3 over a few tokens under a bigram policy: expectations are sums, not samples."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core.types import Head, Model, Output
from tests.models.tiny import fast_jit

T = 3


class Toy(NamedTuple):
    """sequences int [s, T], rewards [s], record of all sequences, theta and ref: logits [v, v] of the next token."""

    sequences: np.ndarray
    rewards: jnp.ndarray
    record: dict
    theta: jnp.ndarray
    ref: jnp.ndarray


MODEL = Model(
    None, None, lambda params, tokens, *, segments=None: Output(params["table"][tokens]),
    lambda params: Head(jnp.eye(params["table"].shape[1])), None,
)  # fmt: skip


def make(v=4, seed=0):
    """Token 0 stands before the first; rewards are random numbers, so that no symmetry helps."""
    rng = np.random.default_rng(seed)
    sequences = np.stack(np.meshgrid(*[np.arange(v)] * T, indexing="ij"), -1).reshape(-1, T).astype(np.int32)
    tokens = np.concatenate([np.zeros((len(sequences), 1), np.int32), sequences[:, :-1]], 1)
    ones = np.ones_like(sequences)
    record = {"tokens": tokens, "targets": sequences, "segments": ones, "mask": ones.astype(bool)}
    theta, ref = (jnp.asarray(rng.normal(size=(v, v)).astype(np.float32)) for _ in range(2))
    return Toy(sequences, jnp.asarray(rng.normal(size=len(sequences)).astype(np.float32)), record, theta, ref)


def gradient(fn, theta):
    return fast_jit(jax.grad(fn))(theta)


def logps(toy, theta):
    """log pi of every token of every sequence [s, T]."""
    return jax.nn.log_softmax(theta)[toy.record["tokens"], toy.record["targets"]]


def probabilities(toy, theta):
    return jnp.exp(logps(toy, theta).sum(axis=1))


def exact(toy):
    """The gradient of expected reward."""
    return gradient(lambda theta: jnp.sum(probabilities(toy, theta) * toy.rewards), toy.theta)


def expected(toy, losses):
    """Minus the expected gradient of a loss over the policy's own samples: losses(logps [s, T]) -> [s, T] or [s]."""
    p = probabilities(toy, toy.theta)  # a sampler is not differentiated
    return -gradient(lambda theta: jnp.sum(p * losses(logps(toy, theta)).reshape(len(p), -1).sum(axis=1)), toy.theta)


def groups(toy, n):
    """(index of every group of n sequences [g, n], its probability [g])."""
    p = probabilities(toy, toy.theta)
    index = np.stack(np.meshgrid(*[np.arange(len(p))] * n, indexing="ij"), -1).reshape(-1, n)
    return index, jnp.prod(p[index], axis=1)


def values(toy):
    """E[reward | the tokens so far] before each token [s, T]: the true value function."""
    p, out = np.asarray(probabilities(toy, toy.theta), np.float64), np.zeros((len(toy.sequences), T))
    for i, sequence in enumerate(toy.sequences):
        for t in range(T):
            same = (toy.sequences[:, :t] == sequence[:t]).all(axis=1)
            out[i, t] = (p * np.asarray(toy.rewards))[same].sum() / p[same].sum()
    return jnp.asarray(out, jnp.float32)
