"""Both kinds of encoder keep the promises that masked-language modelling rests on."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core import ops, spec
from jaxllm.core.types import UserError
from jaxllm.models import encoder, families
from jaxllm.models.encoder import EncoderConfig
from tests.models.tiny import fast_jit, weights

BERT = EncoderConfig(vocab_size=50, max_length=16, d_model=16, n_layers=2, n_heads=4, d_ff=24, pooler=True)
ROBERTA = replace(BERT, n_types=1, position_offset=2, tied=False, pooler=False, norm_eps=1e-5)
KINDS = {"bert": BERT, "roberta": ROBERTA}
LENGTHS = (5, 3, 6)
PLACES = [(0, 0, 5), (0, 5, 8), (1, 0, 6)]  # row, start, end of every sequence in PACKED


def rows(places, n, length=10, seed=0):
    """{tokens, segments} with sequence i of LENGTHS at places[i]; padding holds the token 9."""
    rng = np.random.default_rng(seed)
    out = {"tokens": np.full((n, length), 9, np.int32), "segments": np.zeros((n, length), np.int32)}
    for size, (row, start, end) in zip(LENGTHS, places, strict=True):
        out["tokens"][row, start:end] = rng.integers(1, 50, size)
        out["segments"][row, start:end] = out["segments"][row].max() + 1
    return out


PACKED = rows(PLACES, 3)
SEPARATE = rows([(i, 0, n) for i, n in enumerate(LENGTHS)], 3)


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request):
    """A model, its weights, its jitted hidden states, and the gradient of a loss on every real token."""
    model = encoder.make(KINDS[request.param])
    params = weights(model.specs)

    def loss(params, batch):
        hidden = model.apply(params, batch["tokens"], segments=batch["segments"]).hidden
        return ops.cross_entropy(model.head(params), hidden, batch["tokens"], batch["segments"] != 0)[0]

    return SimpleNamespace(
        config=model.config, model=model, params=params,
        hidden=fast_jit(lambda p, b: model.apply(p, b["tokens"], segments=b["segments"]).hidden),
        grad=fast_jit(jax.value_and_grad(loss)), loss=loss,
    )  # fmt: skip


def close(a, b, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=atol), a, b)


def test_every_position_reads_every_other_of_its_segment_and_no_other(kind):
    """d hidden[t] / d embeds[s] is 0 exactly where the segments differ."""
    segments = np.array([[1, 1, 1, 2, 2, 0]])
    embeds = jax.random.normal(jax.random.key(0), (1, 6, 16))
    direction = jax.random.normal(jax.random.key(1), (16,))

    def at(embeds, t):
        return kind.model.apply(kind.params, None, embeds=embeds, segments=segments).hidden[0, t] @ direction

    grads = fast_jit(jax.vmap(jax.grad(at), (None, 0)))(embeds, jnp.arange(5))
    size = np.abs(np.asarray(grads)[:, 0]).max(-1)  # [t, s]
    same = segments[0, :5, None] == segments
    assert (size[~same] == 0).all() and (size[same] > 1e-6).all()


def test_packed_equals_separate(kind):
    packed, separate = kind.hidden(kind.params, PACKED), kind.hidden(kind.params, SEPARATE)
    for i, (row, start, end) in enumerate(PLACES):
        close(packed[row, start:end], separate[i, : end - start])
    one, other = kind.grad(kind.params, PACKED), kind.grad(kind.params, SEPARATE)
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5)
    close(one[1], other[1], atol=2e-5)


def test_padding_changes_nothing(kind):
    short = {name: x[:, :6] for name, x in SEPARATE.items()}
    real = short["segments"] != 0
    other = {**SEPARATE, "tokens": np.where(SEPARATE["segments"] == 0, 3, SEPARATE["tokens"])}
    expected = np.asarray(kind.hidden(kind.params, short))
    assert np.isfinite(expected).all()
    close(np.asarray(kind.hidden(kind.params, other))[:, :6][real], expected[real])


def test_scan_equals_unrolled_and_remat_equals_plain(kind):
    expected = kind.grad(kind.params, PACKED)
    model = encoder.make(replace(kind.config, unroll=True, remat="full"))

    def loss(params):
        hidden = model.apply(params, PACKED["tokens"], segments=PACKED["segments"]).hidden
        return ops.cross_entropy(model.head(params), hidden, PACKED["tokens"], PACKED["segments"] != 0)[0]

    close(fast_jit(jax.value_and_grad(loss))(kind.params), expected, atol=2e-5)


def test_positions_types_and_embeds_are_rows_of_their_tables(kind):
    """The input of the first layer is norm(token + position + type), whatever way they are given."""
    p, length = kind.params["embed"], 4
    tokens, positions, types = np.array([[3, 1, 4, 1]]), np.array([[7, 0, 2, 2]]), np.array([[0, 1, 1, 0]]) % kind.config.n_types

    def inputs(**more):
        return np.asarray(kind.model.apply(kind.params, tokens, taps=("layer_inputs",), **more).aux["layer_inputs"][0, 0])

    def expected(at, of):
        x = np.asarray(p["tokens"])[tokens[0]] + np.asarray(p["positions"])[at] + np.asarray(p["types"])[of]
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + kind.config.norm_eps)
        return x * np.asarray(p["norm"]["scale"]) + np.asarray(p["norm"]["bias"])

    first = kind.config.position_offset
    close(inputs(), expected(np.arange(length) + first, np.zeros(length, int)), atol=1e-4)
    close(inputs(positions=positions, types=types), expected(positions[0] + first, types[0]), atol=1e-4)
    embeds = p["tokens"][tokens]
    out = kind.model.apply(kind.params, None, embeds=embeds).hidden
    close(out, kind.model.apply(kind.params, tokens).hidden)


def test_states_are_before_the_transform_and_hidden_after(kind):
    plain = encoder.make(replace(kind.config, mlm=False))
    params = {k: v for k, v in kind.params.items() if k not in ("transform", "head")}
    assert spec.abstract(plain.specs).keys() == params.keys()
    out, bare = (
        m.apply(p, PACKED["tokens"], segments=PACKED["segments"]) for m, p in ((kind.model, kind.params), (plain, params))
    )
    close(bare.hidden, out.aux["states"])
    assert set(out.aux) == {"states"} and np.abs(np.asarray(out.hidden - bare.hidden)).max() > 0.1
    with pytest.raises(ValueError, match="mlm=False"):
        plain.head(params)


def test_the_head_is_the_embedding_and_a_bias(kind):
    c, head = kind.config, kind.model.head(kind.params)
    assert head.kernel.shape == (16, 128) and head.bias.shape == (128,) and head.vocab_size == 50
    assert np.array_equal(head.kernel, kind.params["embed"]["tokens"].T) == c.tied
    hidden = kind.hidden(kind.params, PACKED)
    expected = np.asarray(hidden) @ np.asarray(head.kernel) + np.asarray(head.bias)
    np.testing.assert_allclose(ops.logits(head, hidden), expected[..., :50], rtol=1e-4, atol=1e-4)


def test_the_initial_loss_is_that_of_guessing(kind):
    params = spec.init(kind.model.specs, jax.random.key(0))
    bound = 0.1 if kind.config.tied else 0.9
    assert abs(kind.grad(params, PACKED)[0] / sum(LENGTHS) - np.log(50)) < bound


def test_bfloat16_is_close(kind):
    model = encoder.make(replace(kind.config, dtype="bfloat16"))
    hidden = fast_jit(lambda p: model.apply(p, PACKED["tokens"], segments=PACKED["segments"]).hidden)(kind.params)
    full = np.asarray(kind.hidden(kind.params, PACKED))
    assert hidden.dtype == jnp.bfloat16
    assert 0 < np.abs(np.asarray(hidden, np.float32) - full).max() < 0.15 * np.abs(full).max()


def test_what_an_encoder_does_not_take_is_refused(kind):
    for name in ("cache", "context"):
        with pytest.raises(ValueError, match=name):
            kind.model.apply(kind.params, PACKED["tokens"], **{name: jnp.zeros((2, 3, 4))})
    with pytest.raises(ValueError, match="no cache"):
        kind.model.init_cache(1, 4)


@pytest.mark.parametrize(
    "name,published",
    [
        ("bert-base", 110_106_428 - 2 * 769),  # BertForPreTraining without its next-sentence layer
        ("bert-large", 336_226_108 - 2 * 1025),
        ("roberta-base", 124_697_433),
        ("roberta-large", 355_412_057),
    ],
)
def test_parameter_counts_are_the_published_ones(name, published):
    config = encoder.PRESETS[name]
    assert encoder.published_count(config) == published
    untied = replace(config, tied=False)
    assert encoder.published_count(untied) == published + config.vocab_size * config.d_model
    assert encoder.make(config).config == config


def test_a_config_survives_json():
    for config in encoder.PRESETS.values():
        record = families.to_dict(config)
        assert record["family"] == "encoder" and families.from_dict(json.loads(json.dumps(record))) == config


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(n_heads=5), "n_heads=5 does not divide model.d_model=16: use n_heads=4"),
        (dict(activation="swiglu"), "'swiglu': choose one of gelu,"),
        (dict(remat="some"), "none, dots, attention, full, offload"),
        (dict(n_types=0), "model.n_types=0: must be at least 1"),
        (dict(position_offset=-1), "must not be negative"),
    ],
)
def test_impossible_configs_are_one_clear_line(change, message):
    with pytest.raises(UserError, match=message) as error:
        encoder.make(replace(BERT, **change))
    assert "\n" not in str(error.value)
