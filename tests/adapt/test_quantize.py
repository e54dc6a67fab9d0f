"""Int8 kernels: the bound on what rounding loses, products, bytes, and sampling with them."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.adapt.quantize import Int8, quantize
from jaxllm.core import ops
from jaxllm.core.spec import unstack
from jaxllm.core.tree import flatten
from jaxllm.core.types import UserError
from jaxllm.generate.decode import generate
from jaxllm.generate.engine import serve
from jaxllm.models import decoder, paged
from jaxllm.models.layers import dense
from tests.models.tiny import STYLES, documents, fast_jit, weights

MODELS = {name: decoder.make(config) for name, config in STYLES.items()}
TOKENS = np.stack(documents([8, 8], seed=1))


def is_int8(x):
    return isinstance(x, Int8)


def quantized(name):
    params = weights(MODELS[name].specs, seed=4)
    return params, quantize(MODELS[name], params)


@pytest.mark.parametrize("name", list(STYLES))
def test_kernels_are_within_half_a_scale_and_the_rest_is_untouched(name):
    params, small = quantized(name)
    exact, found = flatten(params), flatten(small)
    assert exact.keys() == found.keys()
    kernels = {path for path, x in found.items() if is_int8(x)}
    expected = {p for p in exact if p.endswith("kernel") and ("attention/" in p or "ffn/" in p) and "router" not in p}
    assert kernels == expected
    for path, x in found.items():
        if path not in kernels:
            np.testing.assert_array_equal(x, exact[path])
            continue
        gap = np.abs(np.asarray(x.astype(jnp.float32)) - np.asarray(exact[path]))
        bound = np.broadcast_to(x.scale, gap.shape) / 2
        assert (gap <= bound * (1 + 1e-5)).all() and gap.max() > 0
        assert np.abs(np.asarray(x.values)).max() == 127 and x.values.dtype == jnp.int8


def test_products_are_those_of_the_rounded_kernel():
    params, small = quantized("llama")
    layers = unstack(small)["layers"][1]["attention"]
    x = jax.random.normal(jax.random.key(0), (2, 3, 16))
    heads = jax.random.normal(jax.random.key(1), (2, 3, 4, 4))
    for name, equation, given in (("q", "bld,dhk->blhk", x), ("o", "blhk,hkd->bld", heads)):
        kernel = layers[name]["kernel"]
        assert is_int8(kernel)
        np.testing.assert_allclose(dense(given, equation, kernel), dense(given, equation, kernel.astype(x.dtype)), atol=1e-5)


def test_an_output_channel_of_zeros_stays_zero():
    params, _ = quantized("gpt2")
    params["layers"]["ffn"]["up"]["kernel"] = params["layers"]["ffn"]["up"]["kernel"].at[:, :, 3].set(0)
    kernel = quantize(MODELS["gpt2"], params)["layers"]["ffn"]["up"]["kernel"]
    assert not np.asarray(kernel.astype(jnp.float32))[:, :, 3].any() and np.isfinite(kernel.scale).all()


@pytest.mark.parametrize("name", list(STYLES))
def test_logits_are_close(name):
    model, (params, small) = MODELS[name], quantized(name)
    logits = fast_jit(lambda p: ops.logits(model.head(p), model.apply(p, TOKENS).hidden))
    a, b = (jax.nn.log_softmax(logits(p)) for p in (params, small))
    kl = float(jnp.sum(jnp.exp(a) * (a - b), axis=-1).mean())
    assert 0 < kl < 0.02, kl


def test_bytes_of_the_kernels_are_a_quarter():
    wide = decoder.make(replace(STYLES["llama"], d_model=128, head_dim=32, d_ff=256))
    params = weights(wide.specs)
    small = quantize(wide, params)
    exact = flatten(params)
    found = {path: x for path, x in flatten(small).items() if is_int8(x)}
    before, after = sum(exact[p].nbytes for p in found), sum(x.values.nbytes + x.scale.nbytes for x in found.values())
    assert 0.25 < after / before < 0.27


def test_sampling_takes_the_rounded_kernels():
    model, (_, small) = MODELS["llama"], quantized("llama")
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32) if is_int8(x) else x, small, is_leaf=is_int8)
    arguments = TOKENS, np.array([8, 5]), jax.random.key(0)
    options = {"max_new_tokens": 6, "temperature": 0.0}
    greedy = fast_jit(partial(generate, model, **options))
    expected = greedy(rounded, *arguments).tokens
    np.testing.assert_array_equal(greedy(small, *arguments).tokens, expected)

    def queue(params, *arguments):
        return serve(model, params, *arguments, paged.empty(model, slots=1, pages=4, page=4), **options).samples.tokens

    np.testing.assert_array_equal(fast_jit(queue)(small, *arguments), expected)


def test_a_pattern_without_kernels_is_refused():
    params = weights(MODELS["llama"].specs)
    with pytest.raises(UserError, match="'nothing' matches no kernel of DecoderConfig"):
        quantize(MODELS["llama"], params, "nothing")
