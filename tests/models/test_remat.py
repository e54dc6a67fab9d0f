"""Rematerialisation: what is recomputed changes no number, and each policy holds less than the one before."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxllm.core import spec
from jaxllm.losses import lm
from jaxllm.models import decoder
from jaxllm.models.stack import POLICIES
from tests.models.tiny import LLAMA, documents, fast_jit, record

BASE = replace(LLAMA, n_layers=4, max_length=64, d_ff=48)
BATCH = record([[d] for d in documents([65] * 4)], 64)
PARAMS = {"policy": spec.init(decoder.specs(BASE), jax.random.key(0))}


def compiled(remat, *, unroll=False):
    """The compiled loss and gradients of a model of 4 layers."""
    loss = lm.loss(decoder.make(replace(BASE, remat=remat, unroll=unroll)))
    grad = jax.value_and_grad(lambda params: loss(params, BATCH, None)[0].total)
    return fast_jit(grad).lower(PARAMS).compile()


@pytest.fixture(scope="module")
def scanned():
    return {name: compiled(name) for name in POLICIES}


@pytest.fixture(scope="module")
def plain(scanned):
    return scanned["none"](PARAMS)


def equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("remat", [name for name in POLICIES if name != "none"])
def test_every_policy_gives_the_same_loss_and_gradients(remat, scanned, plain):
    equal(plain, scanned[remat](PARAMS))


def test_each_policy_holds_less_than_the_one_before(scanned):
    held = [scanned[name].memory_analysis().temp_size_in_bytes for name in ("none", "dots", "attention", "full")]
    assert held == sorted(held, reverse=True) and held[-1] < 0.6 * held[0], held
    assert len(set(held)) == len(held), "two policies that hold the same"


def test_unrolled_layers_are_kept_from_being_merged(plain):
    """Outside a loop a compiler finds the forward pass's values again; a barrier tells it not to (the CPU's looks past it)."""
    loss = lm.loss(decoder.make(replace(BASE, n_layers=1, remat="full", unroll=True)))
    shapes = {"policy": spec.abstract(decoder.specs(replace(BASE, n_layers=1)))}
    text = jax.jit(jax.grad(lambda p: loss(p, BATCH, None)[0].total)).lower(shapes).as_text()
    assert "optimization_barrier" in text
    equal(plain, compiled("full", unroll=True)(PARAMS))


def residuals(remat):
    """{what the backward pass keeps of the forward one: (shape, where it comes from)} for one layer's scan."""
    from jax._src.ad_checkpoint import saved_residuals

    loss = lm.loss(decoder.make(replace(BASE, remat=remat)))
    return saved_residuals(lambda params: loss(params, BATCH, None)[0].total, PARAMS)


def test_what_is_kept():
    """From the residuals of a scan: [layers, ...] arrays of activations."""
    b, l, d, h, k, f = 4, 64, BASE.d_model, BASE.n_heads, BASE.dim_head, BASE.d_ff  # noqa: E741
    kept = {name: [a for a, _ in residuals(name) if a.shape[:1] == (4,) and a.shape[1:3] == (b, l)] for name in POLICIES}
    shapes = {name: sorted(a.shape[3:] for a in found) for name, found in kept.items()}
    assert shapes["full"] == [(d,)]
    assert shapes["attention"] == [(d,)]
    heads = (4, b, BASE.kv_heads, h // BASE.kv_heads, l, k)  # attention's output, before its heads go behind the length
    assert [a.shape for a, _ in residuals("attention") if a.shape[:2] == (4, b) and a.ndim > 4] == [heads]
    assert (f,) in shapes["dots"] and (h, k) in shapes["dots"] and len(shapes["dots"]) > 2
    assert len(shapes["none"]) > len(shapes["dots"])
    host = [a for a in kept["offload"] if a.memory_space == jax.memory.Space.Host]
    assert [a.shape[3:] for a in host] == [(d,)] and len(kept["offload"]) == 1
