"""Rows that come and go draw what each would draw alone, from one program a step and one a prompt length."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.spec import unstack
from jaxllm.generate import decode, slots
from jaxllm.generate.sampling import warp, warp_rows
from jaxllm.models import decoder, recurrent
from jaxllm.train.compiled import programs
from tests.models.tiny import STYLES, documents, fast_jit, weights

NEW, LENGTH = 6, 32
MODELS = {"llama": decoder.make(STYLES["llama"]), "lstm": recurrent.make(recurrent.LSTMConfig(50, 32, 16, 16, 2))}
SETTINGS = [
    {"temperature": 0.0}, {"temperature": 0.8}, {"temperature": 1.0, "top_k": 5}, {"temperature": 1.3, "top_p": 0.7},
    {"temperature": 0.9, "top_k": 10, "top_p": 0.8},
]  # fmt: skip
PROMPTS = documents([3, 9, 1, 5, 12], seed=5)


@cache
def made(name):
    model = MODELS[name]
    return slots.make_slots(model, 3, LENGTH), unstack(weights(model.specs, seed=4))


def padded(prompt):
    return jnp.asarray(np.pad(prompt, (0, LENGTH - len(prompt)))[None])


def serve(name, requests):
    """Tokens of (prompt, settings, row of the key), through three slots: a new one begins whenever one has ended."""
    s, params = made(name)
    rows, waiting, seated, done = s.empty(), list(enumerate(requests)), {}, {}
    while waiting or seated:
        while waiting and len(seated) < 3:
            number, (prompt, how, i) = waiting.pop(0)
            slot = min({0, 1, 2} - seated.keys())
            held = s.read(params, padded(prompt), jnp.int32(len(prompt)))
            key = jax.random.fold_in(jax.random.key(2), i)
            rows, found = s.place(params, rows, jnp.int32(slot), held, slots.sampling(key, **how), jnp.bool_(False))
            seated[slot], done[number] = number, [int(found.token[0])]
        active = np.isin(np.arange(3), list(seated))
        rows, found = s.step(params, rows, active, jnp.bool_(False))
        for slot, number in list(seated.items()):
            done[number].append(int(found.token[slot]))
            if len(done[number]) == NEW - number % 2:  # they end at different times
                del seated[slot]
    return [done[i] for i in range(len(requests))]


def alone(name, prompt, how, row):
    run = fast_jit(partial(decode.generate, MODELS[name], max_new_tokens=NEW, row_offset=row, **how))
    s = run(weights(MODELS[name].specs, seed=4), jnp.asarray(prompt)[None], jnp.array([len(prompt)]), jax.random.key(2))
    return np.asarray(s.tokens[0, len(prompt) :]).tolist()


@pytest.mark.parametrize("name", list(MODELS))
def test_tokens_are_those_of_generate(name):
    requests = [(p, how, i % 2) for i, (p, how) in enumerate(zip(PROMPTS, SETTINGS, strict=True))]
    requests = requests if name == "llama" else requests[1:]
    for number, (got, request) in enumerate(zip(serve(name, requests), requests, strict=True)):
        assert got == alone(name, *request)[: NEW - number % 2], request


def test_settings_and_prompts_compile_nothing_new():
    serve("llama", [(PROMPTS[0], SETTINGS[0], 0)])
    before = len(programs())
    serve("llama", [(p, {**how, "temperature": 0.5}, 3) for p, how in zip(PROMPTS, SETTINGS, strict=True)])
    assert [name for _, name in programs()[before:] if name in ("jit(read)", "jit(place)", "jit(step)")] == []


def test_the_most_likely_tokens_are_told_when_asked_for():
    s, params = made("llama")
    held = s.read(params, padded(PROMPTS[1]), jnp.int32(9))
    for asked in (False, True):
        _, found = s.place(params, s.empty(), jnp.int32(0), held, slots.sampling(jax.random.key(0), 0.0), jnp.bool_(asked))
        assert found.top_ids.shape == (1, slots.TOPS)
        if asked:
            assert int(found.top_ids[0, 0]) == int(found.token[0])
            np.testing.assert_allclose(found.top_logps[0, 0], found.logps[0], rtol=1e-6)
            assert np.all(np.diff(found.top_logps[0]) <= 0)


@pytest.mark.parametrize("how", SETTINGS[1:])
def test_settings_by_row_are_the_settings_of_a_batch(how):
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 2, (4, 30)).astype(np.float32))
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **how}
    # the other rows ask for other things
    mixed = {n: jnp.asarray([full[n], 0.5 if n == "temperature" else 1, full[n], full[n]]) for n in full}
    mixed = {n: x.astype(jnp.int32 if n == "top_k" else jnp.float32) for n, x in mixed.items()}
    got, want = np.asarray(warp_rows(logits, **mixed)), np.asarray(warp(logits, **full))
    rows = [0, 2, 3]
    np.testing.assert_array_equal(np.isfinite(got[rows]), np.isfinite(want[rows]))
    np.testing.assert_allclose(got[rows], want[rows], rtol=1e-6)


def test_prompt_lengths_have_few_buckets():
    assert slots.buckets(96) == (64, 96)
    assert slots.buckets(64) == (64,)
    assert slots.buckets(40) == (40,)
    assert slots.buckets(2048) == (64, 128, 256, 512, 1024, 2048)
