"""Heads on any trunk: what they read, that they need no special loader, and that they learn."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core import ops, spec
from jaxllm.core.types import UserError
from jaxllm.models import decoder, encoder, families, pooled
from tests.models.test_encoder import BERT, ROBERTA
from tests.models.tiny import LLAMA, fast_jit, weights

TOKENS = np.random.default_rng(0).integers(1, 50, (2, 6)).astype(np.int32)
SEGMENTS = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
RECORD = {"tokens": TOKENS, "segments": SEGMENTS}
PLAIN = encoder.make(replace(ROBERTA, mlm=False))  # without a pooler


def linear(params, x):
    return np.asarray(x) @ np.asarray(params["classifier"]["kernel"]) + np.asarray(params["classifier"]["bias"])


def states_of(model, params):
    out = model.apply(params, TOKENS, segments=SEGMENTS)
    return np.asarray(out.aux.get("states", out.hidden))


@pytest.mark.parametrize("pool", ["first", "mean", "last"])
@pytest.mark.parametrize("trunk", [PLAIN, decoder.make(LLAMA)], ids=["encoder", "decoder"])
def test_a_sequence_is_pooled_over_its_tokens(trunk, pool):
    model = pooled.with_sequence_head(trunk, 3, pool)
    params = weights(model.specs)
    states = states_of(trunk, params)
    expected = {
        "first": states[:, 0],
        "mean": np.stack([states[0, :4].mean(0), states[1].mean(0)]),
        "last": np.stack([states[0, 3], states[1, 5]]),
    }
    got = pooled.scores(model, params, RECORD)
    assert got.shape == (2, 3) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, linear(params, expected[pool]), rtol=1e-4, atol=1e-5)
    changed = {**RECORD, "tokens": np.where(SEGMENTS == 0, 7, TOKENS)}
    np.testing.assert_allclose(pooled.scores(model, params, changed), got, atol=1e-5)


def test_berts_pooler_is_between_the_first_position_and_the_classifier():
    trunk = encoder.make(BERT)
    model = pooled.with_sequence_head(trunk, 3)
    params = weights(model.specs)
    first = states_of(trunk, params)[:, 0]
    inner = np.tanh(first @ np.asarray(params["pooler"]["kernel"]) + np.asarray(params["pooler"]["bias"]))
    np.testing.assert_allclose(pooled.scores(model, params, RECORD), linear(params, inner), rtol=1e-4, atol=1e-4)


def test_token_and_span_heads_read_the_states_before_the_transform():
    trunk = encoder.make(BERT)
    for model, n in ((pooled.with_token_head(trunk, 5), 5), (pooled.with_span_head(trunk), 2)):
        params = weights(model.specs)
        got = pooled.scores(model, params, RECORD)
        assert got.shape == (2, 6, n)
        np.testing.assert_allclose(got, linear(params, states_of(trunk, params)), rtol=1e-4, atol=1e-4)


def test_choices_are_rows_of_their_own():
    model, single = pooled.with_choice_head(encoder.make(BERT)), pooled.with_sequence_head(encoder.make(BERT), 1)
    params = weights(model.specs)
    stacked = {k: np.stack([x, x[::-1]]) for k, x in {**RECORD, "types": SEGMENTS // 2}.items()}
    got = pooled.scores(model, params, stacked)
    assert got.shape == (2, 2, 1)
    expected = np.asarray(pooled.scores(single, params, RECORD))
    np.testing.assert_allclose(got, np.stack([expected, expected[::-1]]), rtol=1e-4, atol=1e-5)


def test_a_next_sentence_head_leaves_the_model_as_it_is():
    trunk = encoder.make(BERT)
    model = pooled.with_next_sentence_head(trunk)
    params = weights(model.specs)
    types = np.array([[0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])
    out, plain = (m.apply(params, TOKENS, segments=SEGMENTS, types=types) for m in (model, trunk))
    np.testing.assert_array_equal(out.hidden, plain.hidden)
    np.testing.assert_array_equal(model.head(params).kernel, trunk.head(params).kernel)
    same = pooled.scores(pooled.with_sequence_head(trunk, 2), params, {**RECORD, "types": types})
    np.testing.assert_allclose(out.aux["next_sentence"], same, rtol=1e-5)


@pytest.mark.parametrize("trunk", [PLAIN, decoder.make(LLAMA)], ids=["encoder", "decoder"])
def test_a_probe_reads_the_layer_it_names(trunk):
    params = weights(pooled.with_sequence_head(trunk, 2, "mean", layer=1).specs)
    inputs = trunk.apply(params, TOKENS, segments=SEGMENTS, taps=("layer_inputs",)).aux["layer_inputs"]
    for layer in (0, 1):
        model = pooled.with_sequence_head(trunk, 2, "mean", layer=layer)
        mean = np.stack([inputs[layer, 0, :4].mean(0), inputs[layer, 1].mean(0)])
        np.testing.assert_allclose(pooled.scores(model, params, RECORD), linear(params, mean), rtol=1e-4, atol=1e-5)


def test_graft_takes_the_trunk_and_keeps_the_head():
    trunk = weights(encoder.make(BERT).specs, seed=2)
    model = pooled.with_sequence_head(encoder.make(replace(BERT, mlm=False)), 3)
    fresh = weights(model.specs, seed=3)
    params = pooled.graft(fresh, trunk)
    assert jax.tree.structure(params) == jax.tree.structure(fresh)
    np.testing.assert_array_equal(params["embed"]["tokens"], trunk["embed"]["tokens"])
    np.testing.assert_array_equal(params["classifier"]["kernel"], fresh["classifier"]["kernel"])


@pytest.mark.parametrize(
    "make",
    [
        lambda m: pooled.with_sequence_head(m, 4, "mean", layer=1), lambda m: pooled.with_token_head(m, 3),
        pooled.with_span_head, pooled.with_choice_head, pooled.with_next_sentence_head,
    ],
)  # fmt: skip
def test_a_config_is_all_that_is_needed_to_make_the_model_again(make):
    model = make(encoder.make(BERT))
    config = pooled.PooledConfig(**json.loads(json.dumps({**vars(model.config)})))
    assert config == model.config and config.trunk == families.to_dict(BERT)
    assert (config.d_model, config.max_length, config.vocab_size) == (16, 16, 50)
    again = pooled.make(config)
    assert jax.tree.map(lambda s: s.shape, again.specs) == jax.tree.map(lambda s: s.shape, model.specs)
    params = weights(model.specs)
    record = {k: x[:, None] for k, x in RECORD.items()} if config.head == "choice" else RECORD
    one, other = (m.apply(params, record["tokens"], segments=record["segments"]).hidden for m in (model, again))
    np.testing.assert_array_equal(one, other)


def test_a_head_learns_while_its_trunk_does_not_move():
    model = pooled.with_sequence_head(PLAIN, 2, "mean")
    params = spec.init(model.specs, jax.random.key(0))
    labels = np.array([0, 1])

    def loss(head):
        scores = pooled.scores(model, {**params, "classifier": head}, RECORD)
        return -jnp.mean(jax.nn.log_softmax(scores)[jnp.arange(2), labels])

    head, step = params["classifier"], fast_jit(jax.value_and_grad(loss))
    first = step(head)[0]
    for _ in range(30):
        head = jax.tree.map(lambda p, g: p - 0.5 * g, head, step(head)[1])
    assert step(head)[0] < 0.2 * first


def test_unknown_heads_and_pools_are_refused():
    trunk = encoder.make(BERT)
    with pytest.raises(UserError, match="model.pool='max': choose one of first, mean, last"):
        pooled.with_sequence_head(trunk, 2, "max")
    with pytest.raises(UserError, match="model.head='tag': choose one of sequence, token"):
        pooled.make(pooled.PooledConfig(families.to_dict(BERT), "tag"))
    with pytest.raises(UserError, match="n_labels=0"):
        pooled.with_token_head(trunk, 0)


def test_scores_are_the_logits_of_the_head():
    model = pooled.with_sequence_head(PLAIN, 2)
    params = weights(model.specs)
    hidden = model.apply(params, TOKENS, segments=SEGMENTS).hidden
    np.testing.assert_array_equal(pooled.scores(model, params, RECORD), ops.logits(model.head(params), hidden))


def test_heads_by_name():
    for head, n in (("sequence", 7), ("token", 7), ("span", 2), ("choice", 1)):
        config = pooled.with_head(PLAIN, head, 7, "mean").config
        assert (config.head, config.n_labels, config.pool) == (head, n, "mean")
