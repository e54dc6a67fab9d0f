"""The encoder-decoder keeps the promises that training and generation rest on, in T5's two forms."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core import ops, sharding, spec
from jaxllm.core.types import UserError
from jaxllm.losses import lm
from jaxllm.models import encdec, families, relative
from jaxllm.models.encdec import EncDecConfig
from jaxllm.models.layers import norm
from tests.models.tiny import documents, fast_jit, weights

SMALL = {"vocab_size": 50, "max_length": 32, "d_model": 16, "n_heads": 3, "head_dim": 4, "d_ff": 24}
# few buckets and a short distance, so that every kind of bucket occurs in a dozen tokens
FORMS = {
    "v1.0": EncDecConfig(**SMALL, activation="relu", tied=True, n_layers=2, buckets=8, max_distance=10),
    "v1.1": EncDecConfig(**SMALL, n_layers=1, n_decoder_layers=2, buckets=8, max_distance=10),
}
SOURCES, TARGETS = documents([5, 7, 4], seed=1), documents([6, 4, 7], seed=2)


def pairs_record(rows, sizes):
    """A record from rows of (source, target): targets behind the start token 0."""
    s, t = sizes
    inputs = {k: np.zeros((len(rows), s), np.int32) for k in ("tokens", "segments")}
    out = {k: np.zeros((len(rows), t), np.int32) for k in ("tokens", "targets", "segments")}
    for i, row in enumerate(rows):
        a = b = 0
        for number, (source, target) in enumerate(row, start=1):
            inputs["tokens"][i, a : a + len(source)], inputs["segments"][i, a : a + len(source)] = source, number
            out["tokens"][i, b + 1 : b + len(target)], out["targets"][i, b : b + len(target)] = target[:-1], target
            out["segments"][i, b : b + len(target)] = number
            a, b = a + len(source), b + len(target)
    return {"inputs": inputs, **out, "mask": out["segments"] != 0}


PAIRS = list(zip(SOURCES, TARGETS, strict=True))
# the last row is padding only: it must change nothing, and both batches share a compilation
PACKED = pairs_record([[PAIRS[0], PAIRS[1]], [PAIRS[2]], []], (13, 11))
SEPARATE = pairs_record([[p] for p in PAIRS], (13, 11))
PLACES = [(0, 0, 6), (0, 6, 10), (1, 0, 7)]  # row, start, end of every target in PACKED


@pytest.fixture(scope="module", params=list(FORMS))
def form(request):
    model = encdec.make(FORMS[request.param])
    loss_fn = lm.loss(model, chunk=8)

    def mean_loss(params, batch):
        return loss_fn({"policy": params}, batch, jax.random.key(0))[0].value()

    return SimpleNamespace(
        name=request.param, config=model.config, model=model, params=weights(model.specs),
        hidden=fast_jit(lambda p, r: ops.forward(model, p, r).hidden), grad=fast_jit(jax.value_and_grad(mean_loss)),
    )  # fmt: skip


def close(a, b, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=atol), a, b)


def test_causality_by_gradient(form):
    """d hidden[t] / d embeds[s] is exactly 0 for s > t and not 0 for s <= t; every source state reaches every target."""
    length, c = 6, form.config
    embeds = jax.random.normal(jax.random.key(0), (1, length, c.d_model))
    direction = jax.random.normal(jax.random.key(1), (c.d_model,))
    context = form.model.encode(form.params, {"tokens": jnp.asarray(SOURCES[0])[None]})

    def at(embeds, states, t):
        out = form.model.apply(form.params, None, embeds=embeds, context=context.replace(states=states))
        return out.hidden[0, t] @ direction

    own, source = fast_jit(jax.vmap(jax.grad(at, (0, 1)), (None, None, 0)))(embeds, context.states, jnp.arange(length))
    size = np.abs(np.asarray(own)[:, 0]).max(-1)  # [t, s]
    assert (size[np.triu_indices(length, 1)] == 0).all() and (size[np.tril_indices(length)] > 1e-6).all()
    assert (np.abs(np.asarray(source)[:, 0]).max(-1) > 1e-6).all()


def test_the_encoder_sees_both_ways(form):
    tokens = np.asarray(SOURCES[1])[None]
    other = tokens.copy()
    other[0, -1] = (other[0, -1] + 1) % 50
    encode = fast_jit(lambda t: form.model.encode(form.params, {"tokens": t}).states)
    moved = np.abs(encode(tokens) - encode(other))[0].max(-1)
    assert (moved > 1e-6).all()


def test_padding_changes_nothing(form):
    short = pairs_record([[p] for p in PAIRS], (7, 7))
    padded = jax.tree.map(np.copy, SEPARATE)
    for side in (padded, padded["inputs"]):
        side["tokens"][side["segments"] == 0] = 9  # what stands in the padding is not read
    real = short["segments"] != 0
    close(np.asarray(form.hidden(form.params, short))[real], np.asarray(form.hidden(form.params, padded))[:, :7][real])


def test_packed_equals_separate(form):
    packed, separate = form.hidden(form.params, PACKED), form.hidden(form.params, SEPARATE)
    for i, (row, start, end) in enumerate(PLACES):
        close(packed[row, start:end], separate[i, : end - start])
    (loss, grads), (other, other_grads) = form.grad(form.params, PACKED), form.grad(form.params, SEPARATE)
    np.testing.assert_allclose(loss, other, rtol=1e-6)
    close(grads, other_grads, atol=2e-6)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_packed_pairs_are_isolated_to_the_bit(form):
    before = np.asarray(form.hidden(form.params, PACKED))
    changed = jax.tree.map(np.copy, PACKED)
    changed["inputs"]["tokens"][0, :5] = (changed["inputs"]["tokens"][0, :5] + 7) % 50
    after = np.asarray(form.hidden(form.params, changed))
    np.testing.assert_array_equal(before[0, 6:10], after[0, 6:10])
    np.testing.assert_array_equal(before[1], after[1])
    assert np.abs(before[0, :6] - after[0, :6]).max(-1).min() > 0


def gradients(config, params):
    loss_fn = lm.loss(encdec.make(config))
    return fast_jit(jax.grad(lambda p: loss_fn({"policy": p}, PACKED, jax.random.key(0))[0].total))(params)


def test_scan_unrolled_and_remat_have_the_same_gradients(form):
    plain = gradients(form.config, form.params)
    close(plain, gradients(replace(form.config, unroll=True), form.params), atol=5e-5)
    close(plain, gradients(replace(form.config, remat="full"), form.params), atol=5e-5)


def test_prefill_and_decoding_equal_the_full_forward(form):
    """Right-padded prefixes of unequal lengths, then one token at a time without the context."""
    lengths, steps = np.array([3, 6, 1]), 4
    tokens = np.stack(documents([10, 10, 10], seed=3))
    inputs = SEPARATE["inputs"]
    full = np.asarray(form.hidden(form.params, {"inputs": inputs, "tokens": tokens, "segments": np.ones_like(tokens)}))
    prompts = np.where(np.arange(6)[None, :] < lengths[:, None], tokens[:, :6], 0)
    context = form.model.encode(form.params, inputs)
    params = spec.unstack(form.params)
    prefill = fast_jit(lambda p, c, x: form.model.apply(p, prompts, segments=prompts != 0, cache=c, context=x))
    out = prefill(params, form.model.init_cache(3, 6 + steps), context)
    np.testing.assert_array_equal(out.cache.length, lengths)
    for i, n in enumerate(lengths):
        close(out.hidden[i, :n], full[i, :n])
    step = fast_jit(lambda p, t, c: form.model.apply(p, t, cache=c))
    for k in range(steps):
        here, before = lengths + k, out.cache
        out = step(params, tokens[np.arange(3), here][:, None], before)
        close(out.hidden[:, 0], full[np.arange(3), here])
        assert jax.tree.structure(out.cache) == jax.tree.structure(before)
        close(out.cache.cross, before.cross, atol=0)


def test_taps_are_the_inputs_of_the_decoders_layers(form):
    context = form.model.encode(form.params, SEPARATE["inputs"])
    tokens = SEPARATE["tokens"]
    out = fast_jit(lambda p: form.model.apply(p, tokens, context=context, taps=("layer_inputs",)))(form.params)
    inputs = out.aux["layer_inputs"]
    assert inputs.shape == (2, *tokens.shape, 16)
    close(inputs[0], form.params["embed"]["tokens"][tokens])
    first = encdec.make(replace(form.config, n_decoder_layers=1))
    params = {**form.params, "layers": jax.tree.map(lambda x: x[:1], form.params["layers"])}
    expected = norm(params["final_norm"], inputs[1], 1e-6) * (16**-0.5 if form.config.tied else 1)
    close(fast_jit(lambda p: first.apply(p, tokens, context=context).hidden)(params), expected, atol=1e-4)
    assert form.model.apply(form.params, tokens, context=context).aux == {}


def test_what_it_does_not_take_is_refused(form):
    context = form.model.encode(form.params, SEPARATE["inputs"])
    for name in ("positions", "types"):
        with pytest.raises(ValueError, match=name):
            form.model.apply(form.params, SEPARATE["tokens"], context=context, **{name: jnp.zeros((3, 11), jnp.int32)})
    for cache in (None, form.model.init_cache(3, 11)):
        with pytest.raises(ValueError, match="context"):
            form.model.apply(form.params, SEPARATE["tokens"], cache=cache)


def test_bfloat16_is_close(form):
    model = encdec.make(replace(form.config, dtype="bfloat16"))
    hidden = fast_jit(lambda p: ops.forward(model, p, PACKED).hidden)(form.params)
    assert hidden.dtype == jnp.bfloat16 and model.init_cache(1, 4).layers[0][0].dtype == jnp.bfloat16
    full, real = np.asarray(form.hidden(form.params, PACKED)), PACKED["mask"]
    error = np.abs(np.asarray(hidden, np.float32) - full)[real].max()
    assert 0 < error < 0.2 * np.abs(full).max()


def test_heads_counts_and_the_initial_loss(form):
    c = form.config
    params = fast_jit(lambda k: spec.init(form.model.specs, k))(jax.random.key(0))
    head = form.model.head(params)
    assert head.kernel.shape == (16, 128) and head.vocab_size == 50
    assert ("head" in params) == (not c.tied) and np.array_equal(head.kernel, params["embed"]["tokens"].T) == c.tied
    assert encdec.published_count(c) == spec.count(form.model.specs) - 78 * 16 * (1 if c.tied else 2)
    # logits begin with variance 1: half a nat above guessing
    assert abs(form.grad(params, PACKED)[0] - np.log(50) - 0.5) < 0.6


def test_a_sharded_model_computes_the_same(form):
    config = replace(form.config, n_heads=4)
    model = encdec.make(config)
    params = weights(model.specs)
    rows = jax.tree.map(lambda x: np.concatenate([x, x[:1]]), PACKED)
    whole = fast_jit(lambda p, r: ops.forward(model, p, r).hidden)(params, rows)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with sharding.use(mesh):
        placed = jax.tree.map(jax.device_put, params, spec.shardings(model.specs, mesh, sharding.RULES))
        split = fast_jit(lambda p, r: ops.forward(model, p, r).hidden)(placed, sharding.put_batch(rows, mesh))
    close(np.asarray(whole)[rows["mask"]], np.asarray(split)[rows["mask"]])


# ---- relative positions


def bucket_by_rule(relative_position, bidirectional, n, far):
    """The paper's words: exact up to half of the buckets, then logarithmically wider ones up to `far`."""
    offset = 0
    if bidirectional:
        n //= 2
        offset, distance = (n if relative_position > 0 else 0), abs(relative_position)
    else:
        distance = max(0, -relative_position)
    exact = n // 2
    if distance < exact:
        return offset + distance
    for i in range(n - exact - 1, -1, -1):  # distance ** k >= exact ** (k - i) * far ** i, in whole numbers
        k = n - exact
        if distance**k >= exact ** (k - i) * far**i:
            return offset + exact + i
    raise AssertionError


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("n,far", [(32, 128), (8, 10), (16, 20), (64, 512)])
def test_buckets_follow_the_rule(bidirectional, n, far):
    positions = np.arange(-3 * far, 3 * far + 1)
    got = relative.bucket(jnp.asarray(positions), bidirectional=bidirectional, buckets=n, max_distance=far)
    assert got.tolist() == [bucket_by_rule(int(p), bidirectional, n, far) for p in positions]
    assert set(got.tolist()) == set(range(n)) - ({n // 2} if bidirectional else set())


def test_the_bias_of_rows_at_different_positions():
    table = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    options = {"bidirectional": False, "max_distance": 10}
    full = relative.bias(jnp.asarray(table), jnp.arange(12), jnp.arange(12), **options)
    rows = relative.bias(jnp.asarray(table), jnp.array([[3], [11]]), jnp.arange(12), **options)
    assert full.shape == (3, 12, 12) and rows.shape == (2, 3, 1, 12)
    np.testing.assert_array_equal(rows[0, :, 0], full[:, 3])
    np.testing.assert_array_equal(rows[1, :, 0], full[:, 11])
    assert float(full[2, 9, 5]) == table[bucket_by_rule(5 - 9, False, 8, 10), 2]


# ---- configs

PUBLISHED = {
    "t5-small": 60_506_624, "t5-base": 222_903_552, "t5-large": 737_668_096, "t5-3b": 2_851_598_336, "t5-11b": 11_307_321_344,
    "flan-t5-small": 76_961_152, "flan-t5-base": 247_577_856, "flan-t5-large": 783_150_080, "flan-t5-xl": 2_849_757_184,
    "flan-t5-xxl": 11_135_332_352,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name):
    assert encdec.published_count(encdec.PRESETS[name]) == PUBLISHED[name]


def test_a_config_survives_json(form):
    assert families.from_dict(families.to_dict(form.config)) == form.config
    assert families.make(form.config).config == form.config


@pytest.mark.parametrize(
    "change,words",
    [
        ({"activation": "gelu"}, "model.activation='gelu'.*relu, geglu, swiglu"), ({"n_layers": 0}, "model.n_layers=0"),
        ({"head_dim": None}, "n_heads=3 does not divide model.d_model=16"), ({"buckets": 6}, "model.buckets=6"),
        ({"max_distance": 4}, "model.max_distance=4"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_said(change, words):
    with pytest.raises(UserError, match=words):
        encdec.make(replace(FORMS["v1.1"], **change))
