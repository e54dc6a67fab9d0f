"""A model that counts: after token t it says t + 1 (modulo V), and it tells the host how often it ran."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core.types import Head, Model, Output

V = 11
CALLS = []


def apply(params, tokens, *, segments=None, cache=None):
    jax.debug.callback(lambda x: CALLS.append(x.shape), tokens)
    return Output(jax.nn.one_hot(tokens, V), cache)


MODEL = Model(
    None, None, apply, lambda params: Head(params, vocab_size=V), lambda batch, length: jnp.zeros(batch)
)
PARAMS = jnp.asarray(20 * np.roll(np.eye(V), 1, axis=1), jnp.float32)


def flat(logits):
    """A model that has the same distribution after every token."""
    return jnp.tile(jnp.asarray(logits, jnp.float32)[None, :], (V, 1))
