"""The bidirectional language-model loss against numpy, with a model whose states are rows of two tables."""

import jax
import numpy as np

from jaxllm.core.types import Head, Model, Output
from jaxllm.losses import bilm
from tests.losses import bigram

TABLES = {"forward": 1.0, "backward": -2.0}  # the two directions differ by a factor


def apply(params, tokens, *, segments=None, rng=None, taps=()):
    return Output(None, None, {name: TABLES[name] * params["embed"][tokens] for name in taps})


MODEL = Model(None, None, apply, lambda params: Head(params["kernel"], vocab_size=bigram.V), None)
LOSS = jax.jit(bilm.loss(MODEL, chunk=10))


def test_the_loss_predicts_targets_from_tokens_and_tokens_from_targets():
    params, record = bigram.params(), bigram.record(5, 6)
    mean, metrics = LOSS({"policy": params}, record, jax.random.key(0))
    mask = record["mask"]

    def nll(factor, given, wanted):
        table = bigram.table({**params, "embed": factor * params["embed"]})
        return -table[given, wanted][mask].mean()

    forward, backward = nll(1.0, record["tokens"], record["targets"]), nll(-2.0, record["targets"], record["tokens"])
    np.testing.assert_allclose(metrics["forward"].value(), forward, rtol=1e-5)
    np.testing.assert_allclose(metrics["backward"].value(), backward, rtol=1e-5)
    np.testing.assert_allclose(mean.value(), (forward + backward) / 2, rtol=1e-5)
    assert mean.count == 2 * mask.sum() and abs(forward - backward) > 1e-2


def test_an_empty_mask_gives_zero_and_finite_gradients():
    params, record = bigram.params(), bigram.record(2, 4)
    record["mask"][:] = False
    value, grads = jax.value_and_grad(lambda p: LOSS({"policy": p}, record, None)[0].value())(params)
    assert value == 0 and all(not np.asarray(g).any() for g in jax.tree.leaves(grads))
