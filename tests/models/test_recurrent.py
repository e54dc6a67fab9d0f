"""The LSTM and ELMo's pair of LSTMs keep the promises that training and generation rest on."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core import ops, spec
from jaxllm.core.types import UserError
from jaxllm.generate.decode import generate
from jaxllm.losses import lm
from jaxllm.models import recurrent
from jaxllm.models.recurrent import BiLSTMConfig, LSTMConfig
from tests.models.tiny import documents, fast_jit, record, weights

PLAIN = LSTMConfig(vocab_size=50, max_length=32, d_model=16, d_hidden=16, n_layers=2)
PROJECTED = LSTMConfig(50, 32, d_model=12, d_hidden=20, n_layers=2, tied=False, residual=True, clip=0.9)
ELMO = BiLSTMConfig(50, 32, width=8, d_hidden=12, n_layers=2)
STYLES = {"plain": PLAIN, "projected": PROJECTED}
DOCUMENTS = documents([6, 4, 7], seed=1)
PACKED = record([[DOCUMENTS[0], DOCUMENTS[1]], [DOCUMENTS[2]], []], 10)
SEPARATE = record([[d] for d in DOCUMENTS], 10)
PLACES = [(0, 0, 5), (0, 5, 8), (1, 0, 6)]  # row, start, end of every document in PACKED


@pytest.fixture(scope="module", params=list(STYLES))
def style(request):
    model = recurrent.make(STYLES[request.param])
    loss_fn = lm.loss(model, chunk=8)
    return SimpleNamespace(
        config=model.config, model=model, params=weights(model.specs),
        hidden=fast_jit(lambda p, t, s: model.apply(p, t, segments=s).hidden),
        grad=fast_jit(jax.value_and_grad(lambda p, b: loss_fn({"policy": p}, b, None)[0].value())),
    )  # fmt: skip


@pytest.fixture(scope="module")
def elmo():
    model = recurrent.make_elmo(ELMO)
    taps = ("forward", "backward", "layer_states")
    return SimpleNamespace(
        model=model, params=weights(model.specs), run=fast_jit(lambda p, t, s: model.apply(p, t, segments=s, taps=taps))
    )


def close(a, b, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=atol), a, b)


def by_hand(c, params, tokens):
    """The equations of one row in numpy, one gate and one step at a time: hidden states [l, d]."""
    p = jax.tree.map(np.asarray, params)
    x = p["embed"]["tokens"][tokens]
    sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
    for n in range(c.n_layers):
        layer = jax.tree.map(lambda a, n=n: a[n], p["layers"])
        h, cell, out = np.zeros(c.d_model), np.zeros(c.d_hidden), []
        for row in x:
            z = [
                row @ layer["input"]["kernel"][:, g] + h @ layer["recurrent"]["kernel"][:, g] + layer["bias"][g] for g in range(4)
            ]
            cell = sigmoid(z[1]) * cell + sigmoid(z[0]) * np.tanh(z[2])
            cell = np.clip(cell, -c.clip, c.clip) if c.clip else cell
            h = sigmoid(z[3]) * np.tanh(cell)
            if "projection" in layer:
                h = h @ layer["projection"]["kernel"]
                h = np.clip(h, -c.clip, c.clip) if c.clip else h
            out.append(h)
        x = np.stack(out) + (x if c.residual and n else 0)
    return x


def test_hidden_states_are_those_of_the_equations(style):
    tokens = np.stack(documents([10, 10, 10], seed=3))
    hidden = style.hidden(style.params, tokens, np.ones_like(tokens))
    for row in (0, 2):
        close(hidden[row], by_hand(style.config, style.params, tokens[row]))


def test_the_gradients_are_those_of_a_plain_scan(style, monkeypatch):
    """The recurrence forms the gradients of its weights itself: automatic differentiation agrees."""
    _, own = style.grad(style.params, PACKED)

    def plain(c, params, gates, state, turns):
        (_, _, out), state = recurrent._steps(c, params, gates, jnp.zeros((10, 3, c.d_model)), state, turns)
        return out, state

    monkeypatch.setattr(recurrent, "_recur", plain)
    loss_fn = lm.loss(recurrent.make(style.config), chunk=8)
    expected = fast_jit(jax.grad(lambda p, b: loss_fn({"policy": p}, b, None)[0].value()))(style.params, PACKED)
    close(own, expected, atol=1e-6)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(own))


def test_causality_by_gradient(style):
    """d hidden[t] / d embeds[s] is exactly 0 for s > t, and not 0 for s <= t."""
    length = 6
    embeds = jax.random.normal(jax.random.key(0), (1, length, style.config.d_model))
    at = lambda e, t: style.model.apply(style.params, None, embeds=e).hidden[0, t].sum()  # noqa: E731
    grads = fast_jit(jax.vmap(jax.grad(at), (None, 0)))(embeds, jnp.arange(length))
    size = np.abs(np.asarray(grads)[:, 0]).max(-1)
    assert (size[np.triu_indices(length, 1)] == 0).all() and (size[np.tril_indices(length)] > 1e-8).all()


def test_packed_equals_separate_to_the_bit_and_in_the_gradients(style):
    packed = np.asarray(style.hidden(style.params, PACKED["tokens"], PACKED["segments"]))
    separate = np.asarray(style.hidden(style.params, SEPARATE["tokens"], SEPARATE["segments"]))
    for i, (row, start, end) in enumerate(PLACES):
        close(packed[row, start:end], separate[i, : end - start])
    close(style.grad(style.params, PACKED), style.grad(style.params, SEPARATE), atol=2e-6)
    changed = PACKED["tokens"].copy()
    changed[0, :5] = (changed[0, :5] + 7) % 50
    after = np.asarray(style.hidden(style.params, changed, PACKED["segments"]))
    np.testing.assert_array_equal(packed[0, 5:8], after[0, 5:8])
    assert not np.array_equal(packed[0, :5], after[0, :5])


def test_what_stands_in_the_padding_changes_nothing(style):
    padded = SEPARATE["tokens"].copy()
    padded[SEPARATE["segments"] == 0] = 9
    real = SEPARATE["segments"] != 0
    a = style.hidden(style.params, SEPARATE["tokens"], SEPARATE["segments"])
    b = style.hidden(style.params, padded, SEPARATE["segments"])
    np.testing.assert_array_equal(np.asarray(a)[real], np.asarray(b)[real])


def test_prefill_and_single_steps_equal_the_full_forward(style):
    """Right-padded prompts of unequal lengths, then one token at a time; also with the layers outside of their stack."""
    lengths, steps = np.array([3, 6, 1]), 4
    tokens = np.stack(documents([10, 10, 10], seed=3))
    prompts = np.where(np.arange(6)[None, :] < lengths[:, None], tokens[:, :6], 0)
    full = np.asarray(style.hidden(style.params, tokens, np.ones_like(tokens)))
    apply = fast_jit(lambda p, t, s, c: style.model.apply(p, t, segments=s, cache=c))
    out = apply(style.params, prompts, (prompts != 0).astype(np.int32), style.model.init_cache(3, 10))
    np.testing.assert_array_equal(out.cache.length, lengths)
    for i, n in enumerate(lengths):
        close(out.hidden[i, :n], full[i, :n])
    params = spec.unstack(style.params)
    for step in range(steps):
        here = lengths + step
        out = apply(params, tokens[np.arange(3), here][:, None], np.ones((3, 1), np.int32), out.cache)
        close(out.hidden[:, 0], full[np.arange(3), here])
    np.testing.assert_array_equal(out.cache.length, lengths + steps)


def test_generation_is_the_argmax_of_full_forwards(style):
    lengths, new = np.array([3, 6, 1]), 4
    tokens = np.zeros((3, 10), np.int32)
    tokens[:, :6] = np.where(np.arange(6)[None, :] < lengths[:, None], np.stack(documents([6] * 3, seed=5)), 0)
    sample = fast_jit(partial(generate, style.model, max_new_tokens=new, temperature=0.0))
    out = sample(style.params, tokens[:, :6], lengths, jax.random.key(0))
    logits = fast_jit(lambda p, t: ops.logits(style.model.head(p), style.model.apply(p, t).hidden))
    for step in range(new):
        tokens[np.arange(3), lengths + step] = np.asarray(logits(style.params, tokens))[np.arange(3), lengths + step - 1].argmax(
            -1
        )
    np.testing.assert_array_equal(out.tokens, tokens)


def test_dropout_needs_a_key_and_spares_the_recurrence():
    c = replace(PLAIN, n_layers=1, dropout=0.5)
    model = recurrent.make(c)
    params = weights(model.specs)
    tokens = PACKED["tokens"]
    run = fast_jit(lambda p, rng: model.apply(p, tokens, rng=rng).hidden)
    usual = fast_jit(lambda p: recurrent.make(replace(c, dropout=0.0)).apply(p, tokens).hidden)(params)
    np.testing.assert_array_equal(fast_jit(lambda p: model.apply(p, tokens).hidden)(params), usual)
    a, b = run(params, jax.random.key(1)), run(params, jax.random.key(2))
    assert not np.array_equal(a, b) and 0.3 < (np.asarray(a) == 0).mean() < 0.7
    # with nothing to read, only the recurrence is left: dropout shows in the output alone, which is dropped or doubled
    silent = {**params, "layers": {**params["layers"], "input": jax.tree.map(jnp.zeros_like, params["layers"]["input"])}}
    usual, dropped = model.apply(silent, tokens).hidden, run(silent, jax.random.key(1))
    np.testing.assert_allclose(dropped, np.where(dropped == 0, 0, 2 * usual), rtol=1e-5, atol=1e-6)


def test_bfloat16_is_close_and_keeps_cells_in_float32(style):
    model = recurrent.make(replace(style.config, dtype="bfloat16"))
    out = fast_jit(lambda p: model.apply(p, PACKED["tokens"], cache=model.init_cache(3, 10)))(style.params)
    full = fast_jit(lambda p: style.model.apply(p, PACKED["tokens"], cache=style.model.init_cache(3, 10)).hidden)(style.params)
    assert out.hidden.dtype == jnp.bfloat16 and out.cache.c[0].dtype == jnp.float32
    error = np.abs(np.asarray(out.hidden, np.float32) - np.asarray(full)).max()
    assert 0 < error < 0.1 * np.abs(np.asarray(full)).max()


def test_elmo_reads_in_both_directions(elmo):
    """Position t of the forward states depends on tokens up to t, of the backward states on those from t on."""
    embeds = jax.random.normal(jax.random.key(0), (1, 5, ELMO.width))

    def at(embeds, t, name):
        return elmo.model.apply(elmo.params, None, embeds=embeds, taps=(name,)).aux[name][0, t].sum()

    for name, seen in (("forward", np.tril_indices(5)), ("backward", np.triu_indices(5))):
        grads = fast_jit(jax.vmap(jax.grad(partial(at, name=name)), (None, 0)))(embeds, jnp.arange(5))
        size = np.abs(np.asarray(grads)[:, 0]).max(-1)
        expected = np.zeros((5, 5), bool)
        expected[seen] = True
        np.testing.assert_array_equal(size > 0, expected)


def test_elmo_mixes_its_layers(elmo):
    out = elmo.run(elmo.params, PACKED["tokens"], PACKED["segments"])
    states = np.asarray(out.aux["layer_states"])
    assert states.shape == (3, 3, 10, ELMO.d_model)
    embedded = np.asarray(elmo.params["embed"]["tokens"])[PACKED["tokens"]]
    close(states[0], np.concatenate([embedded, embedded], axis=-1))
    close(states[-1], np.concatenate([out.aux["forward"], out.aux["backward"]], axis=-1))
    w = np.exp(np.asarray(elmo.params["mix"]["weights"]))
    close(out.hidden, float(elmo.params["mix"]["scale"]) * np.einsum("n,nbld->bld", w / w.sum(), states))


def test_elmo_keeps_packed_documents_apart(elmo):
    packed = elmo.run(elmo.params, PACKED["tokens"], PACKED["segments"])
    separate = elmo.run(elmo.params, SEPARATE["tokens"], SEPARATE["segments"])
    for i, (row, start, end) in enumerate(PLACES):
        close(packed.hidden[row, start:end], separate.hidden[i, : end - start])


def test_layer_inputs(style):
    tapped = fast_jit(lambda p: style.model.apply(p, PACKED["tokens"], taps=("layer_inputs",)).aux)(style.params)
    inputs = tapped["layer_inputs"]
    assert inputs.shape == (2, 3, 10, style.config.d_model)
    close(inputs[0], np.asarray(style.params["embed"]["tokens"])[PACKED["tokens"]])
    one = recurrent.make(replace(style.config, n_layers=1))
    params = {**style.params, "layers": jax.tree.map(lambda x: x[:1], style.params["layers"])}
    close(inputs[1], fast_jit(lambda p: one.apply(p, PACKED["tokens"]).hidden)(params))


def test_a_fresh_model_remembers_and_guesses(style):
    params = fast_jit(partial(spec.init, style.model.specs))(jax.random.key(0))
    np.testing.assert_array_equal(params["layers"]["bias"][:, 1], 1)
    assert not np.asarray(params["layers"]["bias"][:, np.array([0, 2, 3])]).any()
    loss, _ = style.grad(params, PACKED)
    assert abs(loss - np.log(50)) < 0.3


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # embedding and head 10,000 d each and its bias; a layer is 4 (2 d^2 + d)
        ("zaremba-medium", 2 * 10_000 * 650 + 10_000 + 2 * 4 * (2 * 650**2 + 650)),  # 20 M
        ("zaremba-large", 2 * 10_000 * 1500 + 10_000 + 2 * 4 * (2 * 1500**2 + 1500)),  # 66 M, the paper's figure
        # 93.6 M published, 75.6 M of them in the four LSTMs; the rest here is a table of pieces in place of characters
        ("elmo", 2 * 32_000 * 512 + 32_000 + 4 * (4 * 4096 * (1024 + 1) + 4096 * 512) + 4),
    ],
)
def test_published_sizes(name, count):
    assert recurrent.published_count(recurrent.PRESETS[name]) == count


def test_what_cannot_be_built_or_is_not_taken_is_refused(style, elmo):
    for name, value in {"d_hidden": 0, "dropout": 1.0, "dtype": "int8", "clip": -1}.items():
        with pytest.raises(UserError, match=name):
            recurrent.make(replace(style.config, **{name: value}))
    with pytest.raises(UserError, match="width"):
        recurrent.make_elmo(replace(ELMO, width=0))
    for model, params in ((style.model, style.params), (elmo.model, elmo.params)):
        with pytest.raises(ValueError, match="context"):
            model.apply(params, PACKED["tokens"], context=jnp.zeros((3, 2, 4)))
    with pytest.raises(ValueError, match="cache"):
        elmo.model.init_cache(1, 4)
