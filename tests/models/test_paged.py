"""The paged cache against the plain one: prefill into pages, steps from them, pages given back and taken again."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.types import UserError
from jaxllm.models import decoder, encdec, paged, recurrent
from jaxllm.models.attention import attend
from tests.models.test_encdec import FORMS
from tests.models.tiny import STYLES, documents, fast_jit, weights

LENGTHS = np.array([3, 6, 1])
TOKENS = np.stack(documents([10, 10, 10], seed=3))
PAGE = 4


def filled(cache, needs):
    """The pool with pages for `needs` positions of each row, taken in turn, and nothing in them."""
    for row, need in enumerate(needs):
        one = jax.tree.map(lambda x: jnp.zeros((1, x.shape[1], 2 * PAGE, x.shape[3])), cache.layers)
        cache = cache.admit(jnp.int32(row), SimpleNamespace(layers=one, length=jnp.zeros(1, jnp.int32)), need)
    return cache


@pytest.mark.parametrize("name", list(STYLES))
def test_prefill_and_steps_in_pages_equal_the_plain_cache(name):
    model = decoder.make(STYLES[name])
    params = weights(model.specs, seed=4)
    apply = fast_jit(lambda p, t, s, c: model.apply(p, t, segments=s, cache=c))
    prompts = np.where(np.arange(6)[None, :] < LENGTHS[:, None], TOKENS[:, :6], 0)
    used = (np.arange(6)[None, :] < LENGTHS[:, None]).astype(np.int32)
    plain = model.init_cache(3, 12)
    pool = filled(paged.empty(model, slots=3, pages=7, page=PAGE), LENGTHS + 4)
    assert int(pool.in_use()) == 2 + 3 + 2
    for tokens, segments in [(prompts, used)] + [(TOKENS[np.arange(3), LENGTHS + i][:, None], used[:, :1]) for i in range(4)]:
        a, b = apply(params, tokens, segments, plain), apply(params, tokens, segments, pool)
        real = segments != 0
        np.testing.assert_allclose(np.asarray(b.hidden)[real], np.asarray(a.hidden)[real], atol=2e-5)
        np.testing.assert_array_equal(a.cache.length, b.cache.length)
        plain, pool = a.cache, b.cache


def test_pages_are_taken_in_order_copied_and_given_back():
    model = decoder.make(STYLES["llama"])
    pool = paged.empty(model, slots=3, pages=6, page=PAGE, dtype="bfloat16")
    assert pool.layers[0][0].dtype == jnp.bfloat16 and pool.page == PAGE
    one = model.init_cache(1, 2 * PAGE)
    one = one.replace(
        layers=jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), one.layers), length=jnp.array([5])
    )
    pool = pool.admit(jnp.int32(1), one, 9)
    np.testing.assert_array_equal(pool.owner, [1, 1, 1, -1, -1, -1])
    np.testing.assert_array_equal(pool.start[:3], [0, PAGE, 2 * PAGE])
    np.testing.assert_array_equal(pool.length, [0, 5, 0])
    copied = np.asarray(pool.layers[0][0][:2].astype(jnp.float32)).transpose(1, 0, 2, 3).reshape(2, 2 * PAGE, -1)
    np.testing.assert_array_equal(copied, one.layers[0][0][0].astype(jnp.bfloat16).astype(jnp.float32))
    assert not pool.layers[0][0][2:].any()
    pool = pool.admit(jnp.int32(2), one, 3).release(jnp.array([False, True, False]))
    np.testing.assert_array_equal(pool.owner, [-1, -1, -1, 2, -1, -1])
    pool = pool.admit(jnp.int32(0), one, 16)
    np.testing.assert_array_equal(pool.owner, [0, 0, 0, 2, 0, -1])
    np.testing.assert_array_equal(pool.start[jnp.array([0, 1, 2, 4])], [0, 4, 8, 12])
    assert not np.asarray(pool.release(jnp.array([True, True, True])).in_use())


def test_attention_over_pages_is_attention_over_the_gathered_row():
    rng = np.random.default_rng(0)
    owner, start = jnp.array([1, 0, -1, 1, 0, 1]), jnp.array([0, 3, 0, 6, 0, 3])
    k, v = (jnp.asarray(rng.normal(size=(6, 2, 3, 5)), jnp.float32) for _ in range(2))
    q = jnp.asarray(10 * rng.normal(size=(2, 1, 4, 5)), jnp.float32)
    positions = jnp.array([[4], [6]])
    for window in (0, 3):
        mask = paged.PagedMask(positions, jnp.zeros((2, 1), jnp.int32), owner, start, window)
        got = mask.attend(q, k, v, scale=0.4, softcap=7.0)
        for row, pages in enumerate(([4, 1], [0, 5, 3])):
            whole = [x[jnp.array(pages)].transpose(1, 0, 2, 3).reshape(1, 2, -1, 5) for x in (k, v)]
            ahead = positions[row, 0] - jnp.arange(whole[0].shape[2])
            seen = (ahead >= 0) & (ahead < (window or 99))
            expected = attend(q[row : row + 1], *whole, seen[None, None], scale=0.4, softcap=7.0)
            np.testing.assert_allclose(got[row], expected[0], atol=2e-6)
    with pytest.raises(ValueError, match="bias"):
        mask.attend(q, k, v, bias=jnp.zeros((4, 1, 3)))


def test_what_cannot_be_in_pages_is_refused():
    llama = decoder.make(STYLES["llama"])
    for sizes, words in (({"slots": 0}, "slots=0"), ({"page": 0}, "page=0"), ({"pages": -1}, "pages=-1")):
        with pytest.raises(UserError, match=words):
            paged.empty(llama, **{"slots": 1, "pages": 1, "page": 1, **sizes})
    for model in (recurrent.make(recurrent.LSTMConfig(50)), encdec.make(next(iter(FORMS.values())))):
        with pytest.raises(UserError, match="only decoders"):
            paged.empty(model, slots=1, pages=1, page=1)
