"""Generation of the encoder-decoder: prefill with its source and steps from the cache equal repeated full forward passes."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core import ops, sharding, spec
from jaxllm.generate.decode import generate, to_record
from jaxllm.models import encdec
from tests.models.test_encdec import FORMS
from tests.models.tiny import documents, fast_jit, weights

NEW = 8
SOURCES = documents([9, 3, 6, 5], seed=7)
INPUTS = {
    "tokens": np.stack([np.pad(s, (0, 9 - len(s)), constant_values=11) for s in SOURCES]),
    "segments": np.stack([np.arange(9) < len(s) for s in SOURCES]).astype(np.int32),
}
STARTS, ONES = np.zeros((4, 1), np.int32), np.ones(4, np.int32)


def loud(specs):
    """Weights whose greedy answers are not one token again: what was read counts for more than the last token."""
    params = weights(specs, seed=6)
    params["embed"]["tokens"] = 0.05 * params["embed"]["tokens"]
    params["relative"]["bias"] = 8 * params["relative"]["bias"]
    for name in ("attention", "cross"):
        params["layers"][name] = jax.tree.map(lambda x: 3 * x, params["layers"][name])
    return params


@pytest.fixture(scope="module", params=list(FORMS))
def form(request):
    model = encdec.make(FORMS[request.param])
    return SimpleNamespace(
        model=model, params=loud(model.specs),
        greedy=fast_jit(partial(generate, model, max_new_tokens=NEW, temperature=0.0)),
        logits=fast_jit(lambda p, i, t: ops.logits(model.head(p), model.apply(p, t, context=model.encode(p, i)).hidden)),
    )  # fmt: skip


@pytest.mark.parametrize("prompts", ["start", "prefixes of unequal lengths"])
def test_greedy_decoding_is_the_argmax_of_repeated_full_forwards(form, prompts):
    lengths = ONES if prompts == "start" else np.array([2, 5, 1, 3])
    p = int(lengths.max())
    tokens = np.zeros((4, p + NEW), np.int32)
    tokens[:, 1:p] = np.stack(documents([p - 1] * 4, seed=8)) if p > 1 else 0
    tokens = np.where(np.arange(p + NEW)[None] < lengths[:, None], tokens, 0)
    out = form.greedy(form.params, tokens[:, :p], lengths, jax.random.key(0), inputs=INPUTS)
    rows = np.arange(4)
    for step in range(NEW):
        logits = np.asarray(form.logits(form.params, INPUTS, tokens))
        tokens[rows, lengths + step] = logits[rows, lengths + step - 1].argmax(-1)
    np.testing.assert_array_equal(out.tokens, tokens)
    np.testing.assert_array_equal(out.lengths, lengths + NEW)
    assert len(np.unique(tokens)) > 5


def test_the_padding_of_sources_changes_nothing(form):
    wide = {k: np.pad(v, ((0, 0), (0, 4)), constant_values=13 * (k == "tokens")) for k, v in INPUTS.items()}
    a, b = (form.greedy(form.params, STARTS, ONES, jax.random.key(0), inputs=inputs) for inputs in (INPUTS, wide))
    np.testing.assert_array_equal(a.tokens, b.tokens)
    other = {**INPUTS, "tokens": (INPUTS["tokens"] + 5) % 50}
    assert not np.array_equal(form.greedy(form.params, STARTS, ONES, jax.random.key(0), inputs=other).tokens, a.tokens)


def test_logps_of_samples_are_those_of_the_trainer(form):
    sample = fast_jit(partial(generate, form.model, max_new_tokens=NEW, temperature=0.9, stop=(3, 4)))
    record = {**to_record(sample(form.params, STARTS, ONES, jax.random.key(1), inputs=INPUTS)), "inputs": INPUTS}
    trained = fast_jit(partial(ops.model_logps, form.model))(form.params, record)
    mask = np.asarray(record["mask"])
    assert mask.sum() > 8
    np.testing.assert_allclose(record["model_logps"], np.where(mask, trained.logp, 0), atol=1e-5)


def test_a_sharded_model_answers_the_same(form):
    model = encdec.make(replace(form.model.config, n_heads=4))
    params = loud(model.specs)
    arguments = (jnp.asarray(STARTS), jnp.asarray(ONES), jax.random.key(0))
    fn = fast_jit(lambda p, i, *a: generate(model, p, *a, inputs=i, max_new_tokens=NEW, temperature=0.0).tokens)
    whole = fn(params, INPUTS, *arguments)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with sharding.use(mesh):
        placed = jax.tree.map(jax.device_put, params, spec.shardings(model.specs, mesh, sharding.RULES))
        split = fn(placed, *sharding.put_batch((INPUTS, STARTS, ONES), mesh), jax.random.key(0))
    np.testing.assert_array_equal(whole, split)
