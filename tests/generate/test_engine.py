"""Continuous batching against the simple path: the same tokens, from one program, with fewer steps of rows."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core import sharding
from jaxllm.core.types import UserError
from jaxllm.generate.decode import generate, over_data
from jaxllm.generate.engine import serve
from jaxllm.models import decoder, paged
from jaxllm.train.compiled import counted
from tests.models.tiny import STYLES, documents, fast_jit, weights

NEW, ROWS, PAGE = 7, 6, 4
LENGTHS = np.array([3, 7, 1, 5, 6, 2], np.int32)
PROMPTS = np.where(np.arange(7)[None, :] < LENGTHS[:, None], np.stack(documents([7] * ROWS, seed=5)), 0).astype(np.int32)
# in training this mixture drops tokens, with a cache it must not: what it drops would depend on the other rows
MIXTURE = replace(STYLES["deepseek"], moe=replace(STYLES["deepseek"].moe, capacity_factor=0.5))
MODELS = {name: decoder.make(config) for name, config in {**STYLES, "deepseek": MIXTURE}.items()}
PARAMS = weights(MODELS["llama"].specs, seed=4)
FEWEST = 4  # pages that hold the longest row: 7 + 7 tokens, the last of which is never read


@cache
def served(name, *, slots=2, pages=8, page=PAGE, dtype=None, **options):
    """A compiled (params, prompts, lengths, key) -> Served."""

    def run(params, prompts, lengths, key, **more):
        model, pool = MODELS[name], paged.empty(MODELS[name], slots=slots, pages=pages, page=page, dtype=dtype)
        return serve(model, params, prompts, lengths, key, pool, **{"max_new_tokens": NEW, **options}, **more)

    return fast_jit(run)


@cache
def simple(name, **options):
    return fast_jit(partial(generate, MODELS[name], **{"max_new_tokens": NEW, **options}))


def same(served, plain):
    for name in ("tokens", "prompt_lengths", "lengths", "mask", "stopped"):
        np.testing.assert_array_equal(getattr(served, name), getattr(plain, name), err_msg=name)
    for name in ("logps", "model_logps"):
        np.testing.assert_allclose(getattr(served, name), getattr(plain, name), atol=2e-4, err_msg=name)


@pytest.mark.parametrize("name", list(STYLES))
def test_tokens_are_those_of_the_simple_path(name):
    """More prompts than slots, of unequal lengths, with rows that stop at different times."""
    stop = tuple(range(0, 50, 7))
    params, key = weights(MODELS[name].specs, seed=4), jax.random.key(2)
    plain = simple(name, stop=stop, temperature=0.0)(params, PROMPTS, LENGTHS, key)
    out = served(name, stop=stop, temperature=0.0)(params, PROMPTS, LENGTHS, key)
    same(out.samples, plain)
    assert int(out.prefills) == ROWS and int(out.peak_pages) <= 8
    # the first token of a row comes from its prompt
    assert int(out.row_steps) == int(np.asarray(plain.mask).sum()) - ROWS
    lengths = np.asarray(plain.lengths - plain.prompt_lengths)
    assert len(set(lengths.tolist())) > 1 or name != "llama"


def test_a_pool_that_holds_one_row_serves_all_in_turn():
    params, key = PARAMS, jax.random.key(2)
    plain = simple("llama", temperature=0.0)(params, PROMPTS, LENGTHS, key)
    out = served("llama", temperature=0.0, slots=3, pages=FEWEST)(params, PROMPTS, LENGTHS, key)
    same(out.samples, plain)
    assert int(out.peak_pages) == FEWEST
    with pytest.raises(UserError, match=r"pages=3 of 4 positions cannot hold one row of 7 \+ 7 tokens: use pages=4 or more"):
        served("llama", pages=FEWEST - 1)(params, PROMPTS, LENGTHS, key)


def test_a_group_is_read_once_and_its_rows_are_those_of_repeated_prompts():
    params, key = PARAMS, jax.random.key(3)
    sampling = {"temperature": 0.8, "top_k": 20, "stop": (1, 2, 3, 4, 5)}
    plain = simple("llama", **sampling)(params, np.repeat(PROMPTS[:3], 4, 0), np.repeat(LENGTHS[:3], 4), key)
    run = counted(served("llama", group=4, slots=5, pages=20, **sampling), "the queue")  # a second compilation raises
    out = run(params, PROMPTS[:3], LENGTHS[:3], key)
    same(out.samples, plain)
    assert int(out.prefills) == 3
    run(params, PROMPTS[3:], LENGTHS[3:], key)


def test_each_row_has_its_own_limit():
    limits = np.array([1, 4, 7, 2, 1, 3])
    params, key = PARAMS, jax.random.key(2)
    plain = simple("llama", temperature=0.0)(params, PROMPTS, LENGTHS, key)
    out = served("llama", temperature=0.0, slots=3, pages=9)(params, PROMPTS, LENGTHS, key, limits=limits)
    np.testing.assert_array_equal(out.samples.lengths, LENGTHS + limits)
    kept = np.arange(14)[None, :] < (LENGTHS + limits)[:, None]
    np.testing.assert_array_equal(out.samples.tokens, np.where(kept, plain.tokens, 0))
    assert int(out.row_steps) == limits.sum() - ROWS and not np.asarray(out.samples.stopped).any()


def test_a_ragged_queue_costs_fewer_row_steps_and_fewer_slots_than_padded_batches():
    """Two batches of three in turn run until their longest row has ended, on slots for the longest row."""
    limits = np.array([7, 1, 2, 1, 7, 1])
    params, key = PARAMS, jax.random.key(2)
    out = served("llama", temperature=0.0, slots=3, pages=9)(params, PROMPTS, LENGTHS, key, limits=limits)
    padded = 3 * (limits[:3].max() - 1 + limits[3:].max() - 1)
    assert int(out.row_steps) == (limits - 1).sum() == 13 < padded == 36
    assert 3 * int(out.steps) < padded and int(out.peak_pages) * PAGE < 3 * (7 + NEW)


def test_a_bfloat16_cache_rounds_and_no_more():
    params, key = PARAMS, jax.random.key(2)
    exact = simple("llama", temperature=0.0)(params, PROMPTS, LENGTHS, key)
    out = served("llama", temperature=0.0, dtype="bfloat16")(params, PROMPTS, LENGTHS, key).samples
    plain = simple("llama", temperature=0.0, cache_dtype="bfloat16")(params, PROMPTS, LENGTHS, key)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    first = np.arange(14)[None, :] == LENGTHS[:, None] + 1
    for rounded in (out, plain):
        gap = np.abs(np.where(first, rounded.model_logps - exact.model_logps, 0)).max()
        assert 0 < gap < 0.05, gap


def test_each_part_of_a_data_mesh_serves_its_own_queue():
    model = MODELS["llama"]
    params, mesh, key = PARAMS, sharding.make_mesh({"data": 2}), jax.random.key(3)

    def sample(params, prompts, lengths, key, row_offset, group):
        pool = paged.empty(model, slots=2, pages=8, page=PAGE)
        options = {"max_new_tokens": NEW, "temperature": 0.8, "stop": (1, 2, 3, 4, 5), "row_offset": row_offset}
        return serve(model, params, prompts, lengths, key, pool, group=group, **options).samples

    plain = simple("llama", stop=(1, 2, 3, 4, 5), temperature=0.8, group=2)(params, PROMPTS, LENGTHS, key)
    with sharding.use(mesh):
        split = fast_jit(over_data(sample, mesh, group=2))(params, jnp.asarray(PROMPTS), jnp.asarray(LENGTHS), key, 0)
    same(split, plain)
