"""Generation against repeated full forward passes, and against the trainer's log-probabilities."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core import ops, sharding, spec
from jaxllm.core.types import Output
from jaxllm.generate.decode import generate, over_data, to_record
from jaxllm.generate.sampling import warp
from jaxllm.generate.stream import make_streamer
from jaxllm.models import decoder
from tests.generate import chain
from tests.models.tiny import STYLES, documents, fast_jit, weights

NEW = 6
LENGTHS = np.array([3, 7, 1, 5])
PROMPTS = np.where(np.arange(7)[None, :] < LENGTHS[:, None], np.stack(documents([7] * 4, seed=5)), 0)


@pytest.fixture(scope="module", params=list(STYLES))
def style(request):
    model = decoder.make(STYLES[request.param])
    return SimpleNamespace(
        model=model, params=weights(model.specs, seed=4),
        greedy=fast_jit(partial(generate, model, max_new_tokens=NEW, temperature=0.0)),
        sample=fast_jit(
            partial(generate, model, max_new_tokens=NEW, temperature=0.8, top_k=20), static_argnames="row_offset"
        ),
        logits=fast_jit(lambda p, t: ops.logits(model.head(p), model.apply(p, t).hidden)),
    )  # fmt: skip


def test_greedy_decoding_is_the_argmax_of_repeated_full_forwards(style):
    out = style.greedy(style.params, PROMPTS, LENGTHS, jax.random.key(0))
    tokens = np.zeros((4, 7 + NEW), np.int32)
    tokens[:, :7] = PROMPTS
    rows = np.arange(4)
    for step in range(NEW):
        logits = np.asarray(style.logits(style.params, tokens))
        tokens[rows, LENGTHS + step] = logits[rows, LENGTHS + step - 1].argmax(-1)
    np.testing.assert_array_equal(out.tokens, tokens)
    np.testing.assert_array_equal(out.lengths, LENGTHS + NEW)
    np.testing.assert_array_equal(out.prompt_lengths, LENGTHS)
    index = np.arange(7 + NEW)[None, :]
    np.testing.assert_array_equal(out.mask, (index >= LENGTHS[:, None]) & (index < LENGTHS[:, None] + NEW))
    assert not out.stopped.any() and len({t for row in tokens for t in row}) > 5


def test_sampled_logps_are_those_of_the_trainer_and_of_the_warped_distribution(style):
    out = style.sample(style.params, PROMPTS, LENGTHS, jax.random.key(1))
    record = to_record(out)
    trained = fast_jit(partial(ops.model_logps, style.model))(style.params, record)
    mask = np.asarray(record["mask"])
    assert mask.sum() == 4 * NEW
    np.testing.assert_allclose(record["model_logps"], np.where(mask, trained.logp, 0), atol=1e-5)
    logits = np.asarray(style.logits(style.params, record["tokens"]))
    warped = jax.nn.log_softmax(warp(jnp.asarray(logits).reshape(-1, 50), temperature=0.8, top_k=20))
    picked = np.take_along_axis(
        np.asarray(warped).reshape(4, -1, 50), np.asarray(record["targets"])[..., None], -1
    )[..., 0]
    np.testing.assert_allclose(record["logps"], np.where(mask, picked, 0), atol=1e-5)
    assert np.abs(record["logps"] - record["model_logps"]).max() > 1e-3


def test_a_row_does_not_depend_on_its_batch(style):
    whole = style.sample(style.params, PROMPTS, LENGTHS, jax.random.key(1))
    part = style.sample(style.params, PROMPTS[2:], LENGTHS[2:], jax.random.key(1), row_offset=2)
    np.testing.assert_array_equal(whole.tokens[2:], part.tokens)
    np.testing.assert_allclose(whole.logps[2:], part.logps, atol=1e-5)
    same = np.tile(PROMPTS[:1], (4, 1)), np.tile(LENGTHS[:1], 4)
    rows = np.asarray(style.sample(style.params, *same, jax.random.key(1)).tokens)
    assert len({row.tobytes() for row in rows}) == 4, "equal prompts must draw their own samples"


def test_stream_equals_generate_on_a_batch_of_one(style):
    prompt = PROMPTS[1, :5]
    kwargs = dict(max_new_tokens=NEW, temperature=0.9, top_p=0.95)
    stop = (3, 4)
    out = fast_jit(partial(generate, style.model, stop=stop, **kwargs))(
        style.params, prompt[None], np.array([5]), jax.random.key(7)
    )
    expected = [int(t) for t in out.tokens[0, 5 : int(out.lengths[0])] if int(t) not in stop]
    streamer = make_streamer(style.model, temperature=0.9, top_p=0.95)
    got = list(streamer(style.params, prompt, jax.random.key(7), max_new_tokens=NEW, stop=stop))
    assert got == expected and got


# a model that counts up: after t comes t + 1


def run_chain(prompts, lengths, stop, n=9):
    chain.CALLS.clear()
    fn = jax.jit(partial(generate, chain.MODEL, max_new_tokens=n, stop=stop, temperature=0.0))
    out = jax.block_until_ready(fn(chain.PARAMS, np.asarray(prompts), np.asarray(lengths), jax.random.key(0)))
    jax.effects_barrier()
    return out, len(chain.CALLS)


def test_stop_tokens_end_rows_and_the_loop():
    out, calls = run_chain([[1, 2], [4, 0]], [2, 1], stop=(6, 9))
    np.testing.assert_array_equal(out.tokens[0], [1, 2, 3, 4, 5, 6, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(out.tokens[1], [4, 5, 6, 0, 0, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(out.lengths, [6, 3])
    assert out.stopped.all()
    np.testing.assert_array_equal(out.mask.sum(1), [4, 2])  # the stop token is a sampled token
    assert calls == 4, "one prefill and three steps: the loop must end when every row has stopped"


def test_without_a_stop_the_loop_runs_to_the_end():
    out, calls = run_chain([[1, 2], [4, 0]], [2, 1], stop=(), n=5)
    assert calls == 5 and not out.stopped.any()
    np.testing.assert_array_equal(out.lengths, [7, 6])


def test_a_stop_token_as_first_draw_makes_a_completion_of_one():
    out, calls = run_chain([[2]], [1], stop=(3,))
    assert calls == 1 and int(out.lengths[0]) == 2 and bool(out.stopped[0])


def test_the_record_of_samples_as_exact_arrays():
    out, _ = run_chain([[1, 2], [4, 0]], [2, 1], stop=(6,), n=4)
    record = to_record(out)
    np.testing.assert_array_equal(record["tokens"], [[1, 2, 3, 4, 5, 0], [4, 5, 0, 0, 0, 0]])
    np.testing.assert_array_equal(record["targets"], [[2, 3, 4, 5, 6, 0], [5, 6, 0, 0, 0, 0]])
    np.testing.assert_array_equal(record["segments"], [[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(record["mask"], np.array([[0, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]], bool))


def test_frequencies_of_generated_tokens_are_those_of_the_warped_distribution():
    n, logits = 4000, [2.0, 1.0, 0.5, 0.0, -1.0, -9.0, -9.0, -9.0, -9.0, -9.0, -9.0]
    fn = jax.jit(partial(generate, chain.MODEL, max_new_tokens=1, temperature=1.3, top_k=4))
    out = fn(chain.flat(logits), np.zeros((n, 1), np.int32), np.ones(n, np.int32), jax.random.key(11))
    drawn = np.bincount(np.asarray(out.tokens[:, 1]), minlength=chain.V)
    p = np.exp(np.asarray(logits[:4]) / 1.3)
    expected = n * p / p.sum()
    assert drawn[4:].sum() == 0
    assert ((drawn[:4] - expected) ** 2 / expected).sum() < 28  # 3 degrees of freedom
    np.testing.assert_allclose(np.exp(out.logps[:, 1]), (p / p.sum())[out.tokens[:, 1]], rtol=1e-4)


def test_rows_over_a_data_mesh_are_the_rows_of_one_device():
    model = decoder.make(STYLES["llama"])
    params, mesh = weights(model.specs, seed=4), sharding.make_mesh({"data": 4})

    def sample(params, prompts, lengths, key, row_offset):
        return generate(model, params, prompts, lengths, key, max_new_tokens=NEW, row_offset=row_offset).tokens

    arguments = (params, jnp.asarray(PROMPTS, jnp.int32), jnp.asarray(LENGTHS), jax.random.key(3), 0)
    whole = fast_jit(sample)(*arguments)
    with sharding.use(mesh):
        split = fast_jit(over_data(sample, mesh))(*arguments)
    np.testing.assert_array_equal(whole, split)
    with pytest.raises(ValueError, match="data"):
        over_data(sample, sharding.make_mesh({"data": 2, "tensor": 2}))


def test_a_group_from_one_prefill_is_the_group_of_repeated_prompts(style):
    sample = {"max_new_tokens": NEW, "temperature": 1.0, "stop": (3, 4)}
    whole = fast_jit(partial(generate, style.model, **sample))(
        style.params, PROMPTS.repeat(3, 0), LENGTHS.repeat(3), jax.random.key(5)
    )
    group = fast_jit(partial(generate, style.model, group=3, **sample))(style.params, PROMPTS, LENGTHS, jax.random.key(5))
    for name in ("tokens", "lengths", "prompt_lengths", "mask", "stopped"):
        np.testing.assert_array_equal(getattr(group, name), getattr(whole, name), err_msg=name)
    np.testing.assert_allclose(group.logps, whole.logps, atol=1e-5)


def test_a_group_reads_its_prompt_once():
    chain.CALLS.clear()
    fn = jax.jit(partial(generate, chain.MODEL, max_new_tokens=3, temperature=0.0, group=4))
    out = jax.block_until_ready(fn(chain.PARAMS, np.array([[1, 2], [4, 0]]), np.array([2, 1]), jax.random.key(0)))
    jax.effects_barrier()
    assert chain.CALLS == [(2, 2), (8, 1), (8, 1)]
    np.testing.assert_array_equal(out.tokens, [[1, 2, 3, 4, 5]] * 4 + [[4, 5, 6, 7, 0]] * 4)


@pytest.mark.parametrize("prompts", [4, 2, 1])
def test_groups_over_a_data_mesh_are_the_groups_of_one_device(prompts):
    """Four devices, groups of four: whole groups, half a group, and one row of a group on each."""
    mesh = sharding.make_mesh({"data": 4})
    model = chain.MODEL._replace(apply=lambda p, tokens, *, cache, **_: Output(jax.nn.one_hot(tokens, chain.V), cache))

    def sample(params, prompts, lengths, key, row_offset, group=4):
        return generate(model, params, prompts, lengths, key, max_new_tokens=NEW, row_offset=row_offset, group=group).tokens

    given = (chain.flat(np.zeros(chain.V)), jnp.asarray(PROMPTS[:prompts]), jnp.asarray(LENGTHS[:prompts]), jax.random.key(3), 5)
    with sharding.use(mesh):
        split = jax.jit(over_data(sample, mesh, group=4))(*given)
    whole = np.asarray(jax.jit(sample)(*given))
    np.testing.assert_array_equal(whole, split)
    assert len({row.tobytes() for row in whole}) == 4 * prompts


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "tensor": 2}, {"context": 2}], ids=["fsdp x tensor", "context"])
def test_a_sharded_model_answers_the_same(sizes):
    """What `over_data` refuses, the compiler splits."""
    model, mesh = decoder.make(STYLES["llama"]), sharding.make_mesh(sizes)
    params = weights(model.specs, seed=4)
    fn = fast_jit(lambda *a: generate(model, *a, max_new_tokens=NEW, temperature=0.0, group=2).tokens)
    whole = fn(params, PROMPTS, LENGTHS, jax.random.key(0))
    with sharding.use(mesh):
        placed = jax.tree.map(jax.device_put, params, spec.shardings(model.specs, mesh, sharding.RULES))
        split = fn(placed, *sharding.put_batch((PROMPTS, LENGTHS), mesh), jax.random.key(0))
    np.testing.assert_array_equal(whole, split)
