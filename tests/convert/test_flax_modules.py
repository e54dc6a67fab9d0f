"""Flax modules around a Model: its parameters under its paths, its numbers, Flax's transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxllm.convert import flax_modules
from jaxllm.core import ops
from jaxllm.core.tree import flatten
from jaxllm.models import decoder
from tests.convert.shapes import CONFIGS
from tests.models.tiny import weights

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 7)))


@pytest.fixture(scope="module", params=["LlamaForCausalLM", "GPT2LMHeadModel"])
def setup(request):
    model = decoder.make(CONFIGS[request.param])
    params = weights(model.specs)
    return model, params, ops.logits(model.head(params), model.apply(params, TOKENS).hidden)


def paths(tree):
    return {path: (x.shape, x.dtype) for path, x in flatten(tree).items()}


def test_linen(setup):
    model, params, logits = setup
    module = flax_modules.to_linen(model)
    fresh = module.init(jax.random.key(1), TOKENS)
    assert set(fresh) == {"params"} and paths(fresh["params"]) == paths(params)
    assert np.array_equal(module.apply({"params": params}, TOKENS), logits)
    assert logits.shape == (2, 7, 50)
    other = module.init(jax.random.key(2), TOKENS)["params"]
    assert not np.array_equal(other["embed"]["tokens"], fresh["params"]["embed"]["tokens"])
    out = module.apply({"params": params}, TOKENS, method="outputs", taps=("layer_inputs",))
    assert out.aux["layer_inputs"].shape[0] == model.config.n_layers
    segments = jnp.asarray([[1] * 3 + [2] * 4, [1] * 5 + [0] * 2])
    want = ops.logits(model.head(params), model.apply(params, TOKENS, segments=segments).hidden)
    assert np.array_equal(module.apply({"params": params}, TOKENS, segments=segments), want)


def test_linen_under_jit_and_grad(setup):
    model, params, _ = setup
    module = flax_modules.to_linen(model)
    loss = jax.jit(jax.grad(lambda p: jnp.square(module.apply({"params": p}, TOKENS)).mean()))
    ours = jax.jit(jax.grad(lambda p: jnp.square(ops.logits(model.head(p), model.apply(p, TOKENS).hidden)).mean()))
    same = jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-5, atol=1e-7), loss(params), ours(params))
    assert all(jax.tree.leaves(same))


def test_linen_refuses_parameters_of_another_shape(setup):
    model, params, _ = setup
    wrong = {**params, "embed": {**params["embed"], "tokens": jnp.zeros((3, 3))}}
    with pytest.raises(Exception, match="shape"):
        flax_modules.to_linen(model).apply({"params": wrong}, TOKENS)


def test_nnx_split_and_merge(setup):
    model, params, logits = setup
    module = flax_modules.to_nnx(model, params)
    assert np.array_equal(module(TOKENS), logits)
    graph, state = nnx.split(module)
    pure = nnx.to_pure_dict(state)
    assert paths(pure["params"]) == paths(params)
    assert np.array_equal(nnx.merge(graph, state)(TOKENS), logits)
    doubled = nnx.merge(graph, jax.tree.map(lambda x: 2 * x, state))
    assert np.array_equal(doubled.tree()["embed"]["tokens"], 2 * params["embed"]["tokens"])
    assert np.array_equal(module.tree()["embed"]["tokens"], params["embed"]["tokens"])
    out = module.outputs(TOKENS, cache=model.init_cache(2, 9))
    assert out.cache.length.tolist() == [7, 7]


def test_nnx_trains(setup):
    model, params, _ = setup
    module = flax_modules.to_nnx(model, params)
    optimizer = nnx.Optimizer(module, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.square(m(TOKENS)).mean())(module)
        optimizer.update(module, grads)
        return loss

    ours = jax.grad(lambda p: jnp.square(ops.logits(model.head(p), model.apply(p, TOKENS).hidden)).mean())(params)
    first = step(module, optimizer)
    want = jax.tree.map(lambda p, g: p - 0.1 * g, params, ours)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-4, atol=1e-6), module.tree(), want)))
    assert step(module, optimizer) < first


def test_nnx_draws_parameters_from_a_key(setup):
    model, params, _ = setup
    one, same, other = (flax_modules.to_nnx(model, key=jax.random.key(k)).tree() for k in (1, 1, 2))
    assert paths(one) == paths(params)
    assert np.array_equal(one["embed"]["tokens"], same["embed"]["tokens"])
    assert not np.array_equal(one["embed"]["tokens"], other["embed"]["tokens"])
