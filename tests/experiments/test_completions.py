"""Sampling in experiments: a prompt is read once for many samples, and the samples are those of repeated prompts."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments import completions
from jaxllm.models import decoder
from tests.models.tiny import STYLES, documents, weights

TOKENIZER = SimpleNamespace(specials={"end": 3, "eos": 4}, decode=lambda ids: " ".join(map(str, ids)))
LOADED = SimpleNamespace(model=decoder.make(STYLES["llama"]), tokenizer=TOKENIZER)
PARAMS = weights(LOADED.model.specs, seed=4)
LENGTHS = np.array([4, 2, 3], np.int32)
PROMPTS = {"tokens": np.where(np.arange(4) < LENGTHS[:, None], np.stack(documents([4] * 3, seed=5)), 0), "lengths": LENGTHS}


@pytest.mark.parametrize("batch_size", [8, 3], ids=["whole groups", "parts of a group"])
def test_samples_do_not_depend_on_how_they_are_batched(batch_size):
    key = jax.random.key(1)
    done = completions.drawer(LOADED, PROMPTS, 4, batch_size, max_new_tokens=6)(PARAMS, key)
    plain = completions.sampler(LOADED.model, TOKENIZER, max_new_tokens=6)
    wide = {name: column.repeat(4, 0) for name, column in PROMPTS.items()}
    expected = completions.complete(plain, PARAMS, TOKENIZER, wide, key, 12)
    assert done.texts == expected.texts and len(set(done.texts)) > 6
    np.testing.assert_array_equal(done.ended, expected.ended)
    np.testing.assert_array_equal(done.lengths, expected.lengths)
    for name, column in done.record.items():
        np.testing.assert_allclose(column, expected.record[name], atol=1e-5, err_msg=name)


def test_slots_serve_the_same_samples():
    sample = completions.sampler(LOADED.model, TOKENIZER, max_new_tokens=6, group=2)
    queue = completions.sampler(LOADED.model, TOKENIZER, max_new_tokens=6, group=2, slots=2)
    (a, _), (b, _) = (s(PARAMS, PROMPTS, jax.random.key(1), 0) for s in (sample, queue))
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.lengths, b.lengths)
