"""Scalar heads for rewards and values."""

import jax
import numpy as np

from jaxllm.core import spec
from jaxllm.models import decoder, heads
from tests.models.tiny import LLAMA, documents, fast_jit, record, weights

MODEL = decoder.make(LLAMA)
SCALAR = heads.with_scalar_head(MODEL)
RECORD = record([[d] for d in documents([5, 8])], 8)


def test_every_score_is_zero_at_the_start_and_can_move():
    scalar = spec.init({"scalar": SCALAR.specs["scalar"]}, jax.random.key(0))
    params = heads.graft(scalar, weights(MODEL.specs))

    def one(params):
        scores = heads.scalars(SCALAR, params, RECORD)
        return scores[0, 3], scores

    (_, scores), grads = fast_jit(jax.value_and_grad(one, has_aux=True))(params)
    np.testing.assert_array_equal(scores, np.zeros((2, 8)))
    assert np.abs(grads["scalar"]["kernel"]).max() > 0.1 and grads["scalar"]["bias"][0] == 1


def test_graft_takes_the_trunk_and_keeps_the_head():
    trunk = weights(MODEL.specs, seed=2)
    fresh = weights(SCALAR.specs, seed=3)
    params = heads.graft(fresh, trunk)
    assert jax.tree.structure(params) == jax.tree.structure(fresh)
    np.testing.assert_array_equal(params["embed"]["tokens"], trunk["embed"]["tokens"])
    np.testing.assert_array_equal(params["scalar"]["kernel"], fresh["scalar"]["kernel"])


def test_scalars_are_a_linear_map_of_the_hidden_states():
    params = weights(SCALAR.specs, seed=1)

    def both(params):
        hidden = MODEL.apply(params, RECORD["tokens"], segments=RECORD["segments"]).hidden
        return hidden, heads.scalars(SCALAR, params, RECORD)

    hidden, scores = map(np.asarray, fast_jit(both)(params))
    expected = hidden @ np.asarray(params["scalar"]["kernel"])[:, 0] + np.asarray(params["scalar"]["bias"])[0]
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
    assert SCALAR.head(params).kernel.shape == (LLAMA.d_model, 1)
