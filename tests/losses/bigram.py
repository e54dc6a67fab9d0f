"""The smallest model: hidden states are rows of a table, so that a loss can be re-derived by hand."""

import jax.numpy as jnp
import numpy as np

from jaxllm.core.types import Head, Model, Output

V, D = 7, 4


def apply(params, tokens, *, segments=None, rng=None):
    return Output(params["embed"][tokens])


MODEL = Model(None, None, apply, lambda params: Head(params["kernel"], vocab_size=V), None)


def params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "embed": jnp.asarray(rng.normal(size=(V, D)), jnp.float32),
        "kernel": jnp.asarray(rng.normal(size=(D, V)), jnp.float32),
    }


def table(params):
    """log p(next | token) [V, V] in numpy."""
    out = np.asarray(params["embed"], np.float64) @ np.asarray(params["kernel"], np.float64)
    return out - np.log(np.exp(out).sum(-1, keepdims=True))


def record(rows, length, seed=0, prompt=1):
    """Sequence records of random tokens with ragged lengths; the first `prompt` targets are not trained."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(prompt + 1, length + 1, rows)[:, None]
    index = np.arange(length)[None, :]
    real = index < lengths
    tokens = rng.integers(0, V, (rows, length + 1)).astype(np.int32)
    return {
        "tokens": np.where(real, tokens[:, :-1], 0), "targets": np.where(real, tokens[:, 1:], 0),
        "segments": real.astype(np.int32), "mask": real & (index >= prompt),
    }  # fmt: skip


def logps(params, record):
    """log p(target) [b, l] in numpy."""
    return table(params)[record["tokens"], record["targets"]]
