"""The world of token strings against numpy: source, records, gold reward, annotators."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.worlds import pref

V, L = 10, 12
WORLDS = {"plain": {}, "stop": {"stop": 0.15}, "prompted": {"prompt": 3}, "prompted_stop": {"prompt": 3, "stop": 0.15}}


def world(name, **more):
    return pref.make(jax.random.key(3), vocab=V, length=L, successors=3, good=4, **WORLDS[name], **more)


def strings_of(w, record):
    """[(prompt words, words)] as lists, read from the record token by token; asserts that tokens and targets are one sequence."""
    out = []
    record = jax.device_get(record)
    for tokens, targets, segments, mask in zip(*(record[n] for n in ("tokens", "targets", "segments", "mask")), strict=True):
        n = int(segments.sum())
        assert segments[:n].all() and not segments[n:].any() and not mask[n:].any()
        assert tokens[0] == w.begin and (tokens[1:n] == targets[: n - 1]).all()
        assert (mask[:n] == (np.arange(n) >= w.prompt)).all()  # a prompt is not trained, all after it is
        words = list(targets[w.prompt : n])
        if w.stop:
            assert words.pop() == w.end
        assert w.end not in words and w.begin not in words
        out.append((list(tokens[1 : 1 + w.prompt]), words))
    return out


def gold_by_hand(good, likely, words):
    counts = Counter(words)
    distinct = min(len(set(words) & set(good)), 5)
    repeats = sum(max(0, c - 3) for c in counts.values())
    slips = sum(not likely[a, b] for a, b in zip(words, words[1:], strict=False))
    return distinct - 0.5 * repeats - 0.4 * max(slips - 3, 0)


@pytest.mark.parametrize("name", WORLDS)
def test_gold_reward_is_that_of_a_loop_over_words(name):
    w = world(name)
    rng = np.random.default_rng(0)
    n = 200
    words = rng.integers(0, V, (n, L))
    words[: n // 2] = np.where(rng.random((n // 2, L)) < 0.6, words[: n // 2, :1], words[: n // 2])  # many repeats
    lengths = rng.integers(1, L + 1, n) if w.stop else np.full(n, L)
    begun = pref.prompts(w, jax.random.key(1), n)
    record = pref.to_record(w, begun, jnp.asarray(words), jnp.asarray(lengths))
    read, likely = strings_of(w, record), np.asarray(w.likely)
    assert [s for _, s in read] == [list(row[:k]) for row, k in zip(words, lengths, strict=True)]
    good = [p if w.prompt else list(np.flatnonzero(w.good)) for p, _ in read]
    expected = [gold_by_hand(g, likely, s) for g, (_, s) in zip(good, read, strict=True)]
    np.testing.assert_allclose(pref.gold(w, record), expected, atol=1e-5)
    assert min(expected) < -2 and max(expected) > 2 and len({round(x, 3) for x in expected}) > 20
    np.testing.assert_array_equal(pref.lengths(w, record), lengths)
    slips = [sum(not likely[a, b] for a, b in zip(s, s[1:], strict=False)) for _, s in read]
    np.testing.assert_array_equal(pref.slips(w, record), slips)
    np.testing.assert_array_equal(pref.good_words(w, record).sum(axis=1), [len(set(g)) for g in good])


def test_five_good_words_are_the_most_that_pay():
    w = world("plain").replace(good=jnp.arange(V) < 7, likely=jnp.ones((V, V), bool))
    words = jnp.asarray([[0, 1, 2, 3, 7, 7, 7, 8, 8, 8, 9, 9], [0, 1, 2, 3, 4, 7, 7, 7, 8, 8, 8, 9], [*range(10), 0, 1]])
    record = pref.to_record(w, jnp.full((3, 1), w.begin), words, jnp.full(3, L))
    np.testing.assert_array_equal(pref.gold(w, record), [4, 5, 5])


def test_source_follows_its_transitions_and_ends_at_its_rate():
    w, n = world("stop"), 20_000
    words, lengths = jax.device_get(pref.strings(w, jax.random.key(0), n))
    counts = np.zeros((V, V))
    np.add.at(counts, (words[:, :-1], words[:, 1:]), 1)
    seen, p = counts.sum(axis=1, keepdims=True), np.asarray(w.transition)
    z = (counts - seen * p) / np.sqrt(seen * p * (1 - p))
    assert np.abs(z).max() < 4.5  # of 100 cells
    first = np.bincount(words[:, 0], minlength=V)
    assert np.abs(first - n / V).max() < 4.5 * np.sqrt(n / V)
    expected = [0.15 * 0.85**k for k in range(L - 1)] + [0.85 ** (L - 1)]
    frequency = np.bincount(lengths, minlength=L + 1)[1:] / n
    np.testing.assert_allclose(frequency, expected, atol=4.5 * np.sqrt(0.25 / n))
    assert (pref.strings(world("plain"), jax.random.key(0), 5)[1] == L).all()


def test_source_does_not_end_before_its_shortest_length():
    w, n = world("stop", shortest=4), 20_000
    words, lengths = jax.device_get(pref.strings(w, jax.random.key(0), n))
    expected = [0.0] * 3 + [0.15 * 0.85**k for k in range(L - 4)] + [0.85 ** (L - 4)]
    frequency = np.bincount(lengths, minlength=L + 1)[1:] / n
    np.testing.assert_allclose(frequency, expected, atol=4.5 * np.sqrt(0.25 / n))
    assert lengths.min() == 4
    np.testing.assert_array_equal(words, pref.strings(world("stop"), jax.random.key(0), n)[0])  # the words are the same


def test_likely_words_share_what_slips_leave():
    w = world("plain", slip=0.2)
    likely, p = np.asarray(w.likely), np.asarray(w.transition)
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(likely.sum(axis=1), 3)
    np.testing.assert_allclose(p[~likely], 0.2 / V, rtol=1e-5)
    assert (p[likely] > 0.2 / V + 0.8 / 3 / 3).all() and int(w.good.sum()) == 4
    # the source itself seldom earns a penalty, uniform strings often do
    record = pref.to_record(w, pref.prompts(w, jax.random.key(1), 2000), *pref.strings(w, jax.random.key(2), 2000))
    uniform = jax.random.randint(jax.random.key(3), (2000, L), 0, V)
    noise = pref.to_record(w, pref.prompts(w, jax.random.key(1), 2000), uniform, jnp.full(2000, L))
    assert (pref.slips(w, record) > 3).mean() < 0.25 and (pref.slips(w, noise) > 3).mean() > 0.95


def test_prompts_name_distinct_words_and_differ():
    begun = np.asarray(pref.prompts(world("prompted"), jax.random.key(0), 300))
    assert begun.shape == (300, 4) and (begun[:, 0] == V).all() and (begun[:, 1:] < V).all()
    assert all(len(set(row)) == 3 for row in begun[:, 1:].tolist())
    assert set(begun[:, 1:].ravel().tolist()) == set(range(V))
    assert pref.prompts(world("plain"), jax.random.key(0), 2).tolist() == [[V], [V]]


@pytest.mark.parametrize("name", WORLDS)
def test_records_of_the_source_are_whole_sequences(name):
    w = world(name)
    record = pref.to_record(w, pref.prompts(w, jax.random.key(1), 50), *pref.strings(w, jax.random.key(2), 50))
    assert record["tokens"].shape == (50, w.prompt + L + bool(w.stop))
    lengths = [len(s) for _, s in strings_of(w, record)]
    np.testing.assert_array_equal(record["mask"].sum(axis=1), np.add(lengths, bool(w.stop)))
    assert (record["tokens"] * (record["segments"] == 0)).sum() == 0 == (record["targets"] * (record["segments"] == 0)).sum()


@pytest.mark.parametrize("sharpness,flip", [(2.0, 0.0), (0.5, 0.0), (2.0, 0.25), (0.0, 0.1)])
def test_annotators_choose_at_the_bradley_terry_rate(sharpness, flip):
    n, gaps = 20_000, np.array([-1.5, -0.3, 0.0, 0.8])
    a = jnp.repeat(jnp.asarray(gaps), n) + 0.7
    first = np.asarray(pref.prefer(jax.random.key(5), a, jnp.full_like(a, 0.7), sharpness=sharpness, flip=flip))
    p = 1 / (1 + np.exp(-sharpness * gaps))
    expected = p * (1 - flip) + (1 - p) * flip
    np.testing.assert_allclose(first.reshape(4, n).mean(axis=1), expected, atol=4.5 * 0.5 / np.sqrt(n))


def test_biased_annotators_add_what_they_are_taken_in_by():
    worth, words = jnp.asarray([0.5, -1.0, 2.0, 0.0]), jnp.asarray([3.0, 9.0, 6.0, 6.0])
    z = (np.asarray(words) - 6) / np.std([3.0, 9.0, 6.0, 6.0])
    np.testing.assert_allclose(pref.length_biased(worth, words, 0.3), np.asarray(worth) + 0.3 * z, rtol=1e-5)
    np.testing.assert_allclose(pref.length_biased(worth, jnp.full(4, 6.0), 0.3), worth)  # equal lengths: no bias, no nan
    agrees = jnp.asarray([True, False, True, False])
    np.testing.assert_allclose(pref.sycophantic(worth, agrees, 1.5), [2.0, -1.0, 3.5, 0.0])
