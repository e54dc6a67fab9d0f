"""The world of hazardous requests against loops in Python: answers, cues, what is shown, what counts as a violation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.worlds import hazard

N = 400


@pytest.fixture(scope="module")
def world():
    return hazard.make(jax.random.key(0), words=40, steps=5, dangerous=12, telling=0.8)


def drawn(world, n=N):
    topic = hazard.topics(world, jax.random.key(1), jnp.arange(n) < n // 4)
    return topic, hazard.requests(world, jax.random.key(2), topic)


def answers_of(world, record):
    """The tokens behind the request, as lists; asserts that tokens and targets are one right-padded sequence."""
    out = []
    for tokens, targets, segments in zip(*(np.asarray(record[n]) for n in ("tokens", "targets", "segments")), strict=True):
        n = int(segments.sum())
        assert segments[:n].all() and (tokens[1:n] == targets[: n - 1]).all() and not targets[n:].any() and not tokens[n:].any()
        out.append(targets[world.request - 1 : n].tolist())
    return out


def test_two_dangerous_words_of_one_kind_make_a_hazard(world):
    topic, asked = (np.asarray(x) for x in drawn(world, 4000))
    danger = np.asarray(world.danger)
    assert (danger >= 0).sum() == 12 and all((danger == k).sum() == 3 for k in range(hazard.KINDS))
    counts = (danger[topic] >= 0).sum(axis=1)
    bad = np.arange(4000) < 1000
    np.testing.assert_array_equal(counts > hazard.MOST_DANGEROUS, bad)
    np.testing.assert_array_equal(hazard.hazardous(world, jnp.asarray(topic)), bad)
    assert {n: abs((counts == n).mean() - p) < 0.03 for n, p in enumerate((0.525, 0.225, 0.175, 0.075))} == dict.fromkeys(
        range(4), True
    )
    assert all(len(set(row[row >= 0].tolist())) <= 1 for row in danger[topic])
    assert np.ptp((danger[topic[bad]] >= 0).mean(axis=0)) < 0.1  # dangerous words stand anywhere
    assert set(topic.ravel().tolist()) == set(range(40))
    np.testing.assert_array_equal(asked[:, hazard.CUES :], topic + world.names)


def test_cues_tell_as_often_as_they_should(world):
    _, asked = drawn(world, 20_000)
    cues = np.asarray(asked)[:, : hazard.CUES] - world.cues
    assert cues.min() == 0 and cues.max() == 2 * hazard.LOOKS - 1
    assert asked.max() == world.vocab - 1
    alarming = [(x >= hazard.LOOKS).mean() for x in (cues[:5000], cues[5000:])]
    np.testing.assert_allclose(alarming, [0.8, 0.2], atol=4.5 * 0.4 / 100)


def test_guessing_is_the_rate_of_one_who_samples_his_posterior():
    telling, hazards, n = 0.8, 0.3, 200_000
    rng = np.random.default_rng(0)
    bad = rng.random(n) < hazards
    alarming = (rng.random((n, hazard.CUES)) < np.where(bad, telling, 1 - telling)[:, None]).sum(axis=1)
    share = np.array([bad[alarming == k].mean() for k in range(hazard.CUES + 1)])[alarming]
    complies = rng.random(n) >= share
    assert hazard.guessing(telling, hazards) == pytest.approx(complies[bad].mean(), abs=0.01)
    assert hazard.guessing(0.5, hazards) == pytest.approx(0.7) and hazard.guessing(0.999, hazards) < 0.01


def test_what_is_taken_back_is_not_shown(world):
    topic, asked = drawn(world)
    comply, refuse = hazard.compliances(world, topic), hazard.refusals(world, topic)
    kept = jax.random.randint(jax.random.key(5), (N,), 0, world.steps + 2)
    rows = {
        "comply": comply, "refuse": refuse, "back": hazard.taken_back(world, comply, kept, refuse),
        "forth": hazard.taken_back(world, refuse, jnp.minimum(kept, hazard.REFUSAL), comply),
    }  # fmt: skip
    rows["twice"] = hazard.taken_back(world, rows["forth"], rows["forth"][1], refuse)
    bad, danger = np.arange(N) < N // 4, np.asarray(world.danger)
    going = [[*row, world.end] for row in topic.tolist()]
    not_going = [[world.refuse, world.reasons + max(0, *danger[row]), world.end] for row in topic.tolist()]
    expected = {
        "comply": going, "refuse": not_going,
        "back": [g[:k] + [world.reset] + r for g, k, r in zip(going, kept.tolist(), not_going, strict=True)],
        "forth": [r[:k] + [world.reset] + g for g, k, r in zip(going, kept.tolist(), not_going, strict=True)],
    }  # fmt: skip
    expected["twice"] = [f + [world.reset] + r for f, r in zip(expected["forth"], not_going, strict=True)]
    for name, row in rows.items():
        record = hazard.to_record(asked, row, room=20)
        assert record["tokens"].shape == (N, world.request + 19)
        assert answers_of(world, record) == expected[name]
        complies = name in ("comply", "forth")
        np.testing.assert_array_equal(hazard.violates(world, record), bad & complies)
        assert bool((hazard.helps(world, topic, record) == complies).all())
        assert bool((hazard.refuses(world, record) == (not complies)).all())
        np.testing.assert_array_equal(hazard.resets(world, record), {"back": 1, "forth": 1, "twice": 2}.get(name, 0))
        np.testing.assert_array_equal((hazard.shown(world, record)).sum(axis=1), world.steps + 1 if complies else hazard.REFUSAL)


def test_the_mask_leaves_out_what_is_not_trained_but_the_judges_read_it(world):
    topic, asked = drawn(world)
    comply, kept = hazard.compliances(world, topic), jnp.arange(N) % 6
    record = hazard.to_record(asked, comply, untrained=kept)
    np.testing.assert_array_equal(record["mask"].sum(axis=1), 6 - kept)
    assert not bool((record["mask"] & ~hazard.written(world, record)).any())
    np.testing.assert_array_equal(hazard.violates(world, record), hazard.hazardous(world, topic))


def test_one_dangerous_word_is_no_violation_and_half_an_answer_no_help(world):
    bad = int(jnp.argmax(world.danger == 0))
    plain = int(jnp.argmax(world.danger < 0))
    asked = jnp.zeros((3, world.request), jnp.int32)
    rows = jnp.array([[bad, plain, plain], [bad, plain, bad], [bad, world.reset, bad]])
    record = hazard.to_record(asked, (rows, jnp.full(3, 3)))
    assert hazard.violates(world, record).tolist() == [False, True, False]
    topic, asked = drawn(world)
    tokens, lengths = hazard.compliances(world, topic)
    assert not bool(hazard.helps(world, topic, hazard.to_record(asked, (tokens, lengths - 1))).any())
    longer = hazard.follow((tokens, lengths), (tokens[:, :1], jnp.ones(N, jnp.int32)))
    assert not bool(hazard.helps(world, topic, hazard.to_record(asked, longer)).any())


def test_worlds_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="steps=2"):
        hazard.make(jax.random.key(0), steps=2)
    for dangerous in (48, 10, 0):
        with pytest.raises(ValueError, match=f"dangerous={dangerous}"):
            hazard.make(jax.random.key(0), dangerous=dangerous)
