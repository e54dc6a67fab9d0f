"""Both styles of decoder keep the promises that training and generation rest on."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core import ops, spec
from jaxllm.losses import lm
from jaxllm.models import decoder
from jaxllm.models.layers import norm
from tests.models.tiny import STYLES, documents, fast_jit, record, weights

DOCUMENTS = documents([6, 4, 7], seed=1)
# the last row is padding only: it must change nothing, and both batches share a compilation
PACKED = record([[DOCUMENTS[0], DOCUMENTS[1]], [DOCUMENTS[2]], []], 10)
SEPARATE = record([[d] for d in DOCUMENTS], 10)
PLACES = [(0, 0, 5), (0, 5, 8), (1, 0, 6)]  # row, start, end of every document in PACKED


@pytest.fixture(scope="module", params=list(STYLES))
def style(request):
    """A model, its weights, and its jitted hidden states and loss gradients: compiled once per shape."""
    model = decoder.make(STYLES[request.param])
    params = weights(model.specs)
    loss_fn = lm.loss(model, chunk=8)

    def sum_of_loss(params, batch):
        mean = loss_fn({"policy": params}, batch, jax.random.key(0))[0]
        return mean.total / mean.count

    return SimpleNamespace(
        name=request.param, config=model.config, model=model, params=params,
        hidden=fast_jit(lambda p, t, s: model.apply(p, t, segments=s).hidden),
        grad=fast_jit(jax.value_and_grad(sum_of_loss)),
    )  # fmt: skip


def close(a, b, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=atol), a, b)


def test_causality_by_gradient(style):
    """d hidden[t] / d embeds[s] is exactly 0 for s > t, and not 0 for s <= t."""
    length = 6
    embeds = jax.random.normal(jax.random.key(0), (1, length, style.config.d_model))
    direction = jax.random.normal(jax.random.key(1), (style.config.d_model,))

    def at(embeds, t):
        return style.model.apply(style.params, None, embeds=embeds).hidden[0, t] @ direction

    grads = fast_jit(jax.vmap(jax.grad(at), (None, 0)))(embeds, jnp.arange(length))
    size = np.abs(np.asarray(grads)[:, 0]).max(-1)  # [t, s]
    assert (size[np.triu_indices(length, 1)] == 0).all()
    assert (size[np.tril_indices(length)] > 1e-6).all()


def test_padding_changes_nothing(style):
    short = SEPARATE["tokens"][:, :7], SEPARATE["segments"][:, :7]
    padded = SEPARATE["tokens"].copy()
    padded[SEPARATE["segments"] == 0] = 9  # what stands in the padding is not read
    real = short[1] != 0
    a = np.asarray(style.hidden(style.params, *short))[real]
    b = np.asarray(style.hidden(style.params, padded, SEPARATE["segments"]))[:, :7][real]
    close(a, b)


def test_packed_equals_separate(style):
    packed = style.hidden(style.params, PACKED["tokens"], PACKED["segments"])
    separate = style.hidden(style.params, SEPARATE["tokens"], SEPARATE["segments"])
    for i, (row, start, end) in enumerate(PLACES):
        close(packed[row, start:end], separate[i, : end - start])
    (loss, grads), (other, other_grads) = style.grad(style.params, PACKED), style.grad(style.params, SEPARATE)
    np.testing.assert_allclose(loss, other, rtol=1e-6)
    close(grads, other_grads, atol=2e-6)


def test_packed_documents_are_isolated_to_the_bit(style):
    before = np.asarray(style.hidden(style.params, PACKED["tokens"], PACKED["segments"]))
    changed = PACKED["tokens"].copy()
    changed[0, :5] = (changed[0, :5] + 7) % 50
    after = np.asarray(style.hidden(style.params, changed, PACKED["segments"]))
    np.testing.assert_array_equal(before[0, 5:8], after[0, 5:8])
    np.testing.assert_array_equal(before[1], after[1])
    assert not np.array_equal(before[0, :5], after[0, :5])


def gradients(config, params):
    loss_fn = lm.loss(decoder.make(config))
    grad = jax.grad(lambda p: loss_fn({"policy": p}, PACKED, jax.random.key(0))[0].total)
    return fast_jit(grad)(params)


def test_scan_unrolled_and_remat_have_the_same_gradients(style):
    plain = gradients(style.config, style.params)
    close(plain, gradients(replace(style.config, unroll=True), style.params), atol=2e-5)
    policy = {"gpt2": "full", "llama": "dots", "gemma": "full", "deepseek": "dots"}[style.name]
    close(plain, gradients(replace(style.config, remat=policy), style.params), atol=2e-5)


def test_prefill_and_decoding_equal_the_full_forward(style):
    """Right-padded prompts of unequal lengths, then one token at a time."""
    lengths, steps = np.array([3, 6, 1]), 4
    tokens = np.stack(documents([10, 10, 10], seed=3))
    prompts = np.where(np.arange(6)[None, :] < lengths[:, None], tokens[:, :6], 0)
    full = np.asarray(style.hidden(style.params, tokens, np.ones_like(tokens)))
    apply = fast_jit(lambda p, t, s, c: style.model.apply(p, t, segments=s, cache=c))
    out = apply(style.params, prompts, prompts != 0, style.model.init_cache(3, 6 + steps))
    np.testing.assert_array_equal(out.cache.length, lengths)
    for i, n in enumerate(lengths):
        close(out.hidden[i, :n], full[i, :n])
    for step in range(steps):
        here = lengths + step
        out = apply(style.params, tokens[np.arange(3), here][:, None], np.ones((3, 1), np.int32), out.cache)
        close(out.hidden[:, 0], full[np.arange(3), here])
    np.testing.assert_array_equal(out.cache.length, lengths + steps)


def test_taps_are_the_inputs_of_the_layers(style):
    tokens = PACKED["tokens"][:1]
    tapped = fast_jit(lambda p: style.model.apply(p, tokens, taps=("layer_inputs",)))(style.params)
    inputs = tapped.aux["layer_inputs"]
    assert inputs.shape == (style.config.n_layers, 1, 10, style.config.d_model)
    embedded = style.params["embed"]["tokens"][tokens] * (4.0 if style.config.embed_scale else 1.0)
    if style.config.positions == "learned":
        embedded = embedded + style.params["embed"]["positions"][None, :10]
    close(inputs[0], embedded)
    # a model of the first layer alone ends where the second begins
    first = decoder.make(replace(style.config, n_layers=1, dense_layers=0, moe=None))
    layers = style.params.get("first_layers", style.params["layers"])
    params = {**style.params, "layers": jax.tree.map(lambda x: x[:1], layers)}
    expected = norm(style.params["final_norm"], inputs[1], style.config.norm_eps)
    close(fast_jit(lambda p: first.apply(p, tokens).hidden)(params), expected, atol=1e-4)
    assert set(style.model.apply(style.params, tokens).aux) == ({"router"} if style.config.moe else set())


def test_bfloat16_is_close_and_its_losses_are_float32(style):
    model = decoder.make(replace(style.config, dtype="bfloat16"))
    hidden = fast_jit(lambda p: model.apply(p, PACKED["tokens"], segments=PACKED["segments"]).hidden)(style.params)
    assert hidden.dtype == jnp.bfloat16 and model.init_cache(1, 4).layers[0][0].dtype == jnp.bfloat16
    full = np.asarray(style.hidden(style.params, PACKED["tokens"], PACKED["segments"]))
    error = np.abs(np.asarray(hidden, np.float32) - full).max()
    assert 0 < error < 0.15 * np.abs(full).max()
    got = ops.token_logp(model.head(style.params), hidden, jnp.asarray(PACKED["targets"]))
    assert got.logp.dtype == jnp.float32


def test_positions_can_be_given(style):
    tokens = PACKED["tokens"]
    shifted = fast_jit(partial(style.model.apply, positions=jnp.tile(jnp.arange(10) + 3, (3, 1))))(style.params, tokens).hidden
    usual = style.hidden(style.params, tokens, np.ones_like(tokens))
    same = np.allclose(shifted, usual, atol=1e-4)
    assert same == (style.config.positions == "rope"), "rotary positions are relative, learned ones are not"


def test_what_a_decoder_does_not_take_is_refused(style):
    for name in ("context", "types"):
        with pytest.raises(ValueError, match=name):
            style.model.apply(style.params, PACKED["tokens"], **{name: jnp.zeros((2, 3, 4))})


def test_counts_and_tied_heads(style):
    c = style.config
    padding = (c.padded_vocab - c.vocab_size) * c.d_model * (1 if c.tied else 2)
    assert decoder.published_count(c) == spec.count(style.model.specs) - padding
    head = style.model.head(style.params)
    assert head.kernel.shape == (c.d_model, c.padded_vocab) and head.vocab_size == c.vocab_size
    assert np.array_equal(head.kernel, style.params["embed"]["tokens"].T) == c.tied
    assert ("head" in style.params) == (not c.tied)


def test_the_initial_loss_is_that_of_guessing(style):
    params = fast_jit(partial(spec.init, style.model.specs))(jax.random.key(0))
    loss, _ = style.grad(params, PACKED)
    bound = 0.1 if style.config.tied else 0.9  # an untied head starts with logits of variance 1
    assert abs(loss - np.log(style.config.vocab_size)) < bound
