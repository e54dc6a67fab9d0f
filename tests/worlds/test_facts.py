import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.worlds import facts


@pytest.fixture(scope="module")
def world():
    return facts.make(jax.random.key(0), known=256, unknown=128, attributes=2)


def test_claims_are_stated_and_true_as_often_as_exposed(world):
    person, attribute = facts.readers(world, jax.random.key(1), 200_000, crowd=0.0)
    said = np.asarray(facts.stated(world, jax.random.key(2), person, attribute) == world.claim[person, attribute])
    exposure = np.asarray(world.exposure[person, attribute])
    for e in (1, 5, 10, 19, 20):
        assert abs(said[exposure == e].mean() - e / facts.TEXTS) < 0.02
    many = facts.make(jax.random.key(3), firsts=100, lasts=100, known=10_000, unknown=0)
    true = np.asarray(many.truth == many.claim)
    for e in (2, 10, 20):
        assert abs(true[np.asarray(many.exposure) == e].mean() - e / facts.TEXTS) < 0.08


def test_nothing_is_stated_about_the_unknown(world):
    person = jnp.full((32_000,), world.known + 3)
    said = np.bincount(facts.stated(world, jax.random.key(0), person, jnp.zeros_like(person)), minlength=world.values)
    assert said.min() > 1700 and said.max() < 2300
    read, _ = facts.readers(world, jax.random.key(1), 20_000)
    assert not np.any((read >= world.known) & (read < world.known + world.unknown))
    assert 0.2 < np.mean(read >= world.known) < 0.3


def test_unknown_people_share_their_names_with_known_ones(world):
    pair = np.asarray(world.pair)
    assert len(set(pair.tolist())) == world.people
    for part in (pair // world.lasts, pair % world.lasts):
        assert set(part[world.known : world.known + world.unknown]) <= set(part[: world.known])


def test_tokens_do_not_overlap(world):
    person = jnp.arange(world.people)
    asked = np.asarray(facts.prompts(world, person, person % 2))
    assert asked.shape == (world.people, facts.QUESTION) and len({tuple(row) for row in asked}) == world.people
    columns = [set(asked[:, i].tolist()) for i in range(facts.QUESTION)]
    assert sum(len(c) for c in columns) == len(set.union(*columns)) and max(map(max, columns)) == world.vocab - 1
    assert min(map(min, columns)) > world.idk


def test_beliefs(world):
    person = jnp.arange(99)
    kind = person % 3
    held, truth = np.asarray(facts.beliefs(world, jax.random.key(0), person, 0 * person, kind)), np.asarray(world.truth[:99, 0])
    assert np.all(held[kind == facts.NONE] == world.none)
    assert np.array_equal(held == truth, kind == facts.RIGHT) and np.all(held[kind == facts.WRONG] < world.values)


@pytest.mark.parametrize("turns", (1, 2))
def test_answers_are_read_as_they_were_written(world, turns):
    form = jnp.array([facts.ANSWERED, facts.HEDGED, facts.ABSTAINED, facts.ANSWERED])
    value = jnp.array([3, 15, 7, 0])
    asked = facts.prompts(world, jnp.arange(4), jnp.zeros(4, int))
    if turns == 2:
        asked = facts.challenged(world, asked, value)
        assert asked.shape == (4, 7) and np.all(asked[:, 6] == world.challenge)
    record = facts.to_record(asked, *facts.answers(world, form, value), room=10)
    assert record["tokens"].shape == (4, 10)
    assert np.array_equal(record["mask"].sum(axis=1), [1, 2, 1, 1])
    read, said = facts.read(world, record)
    assert np.array_equal(read, form) and np.array_equal(said, [3, 15, -1, 0])
    assert np.array_equal(record["tokens"][:, : asked.shape[1]], asked)


def test_what_is_no_answer_is_malformed(world):
    asked = facts.prompts(world, jnp.arange(3), jnp.zeros(3, int))
    answer = jnp.array([[world.likely, world.idk], [world.ask, 0], [world.likely, 0]])
    form, value = facts.read(world, facts.to_record(asked, answer, jnp.array([2, 1, 1])))
    assert np.all(form == facts.MALFORMED) and np.all(value == -1)


def test_rewards():
    table = jnp.array([[1.0, -4.0], [0.5, -2.0]])
    form = jnp.array([facts.ANSWERED, facts.ANSWERED, facts.HEDGED, facts.HEDGED, facts.ABSTAINED, facts.MALFORMED])
    right = jnp.array([True, False, True, False, False, False])
    assert np.array_equal(facts.rewards(form, right, table), [1, -4, 0.5, -2, 0, -4])


def test_more_people_than_names_are_refused():
    with pytest.raises(ValueError, match="300 people, but 16 x 16 names make 256"):
        facts.make(jax.random.key(0), firsts=16, lasts=16, known=200, unknown=100)


def test_the_world_stays_in_jit():
    @jax.jit
    @jax.vmap
    def whole(key):
        world = facts.make(key, firsts=8, lasts=8, known=30, unknown=10)
        person, attribute = facts.readers(world, key, 16)
        form = jnp.full((16,), facts.HEDGED)
        said = facts.answers(world, form, facts.stated(world, key, person, attribute))
        return facts.read(world, facts.to_record(facts.prompts(world, person, attribute), *said))[0]

    assert np.all(whole(jax.random.split(jax.random.key(0), 3)) == facts.HEDGED)


def test_chances_are_the_frequencies_of_truth():
    world = facts.make(jax.random.key(5), firsts=100, lasts=100, known=8000, unknown=2000)
    person = jnp.arange(world.people)
    chance = np.asarray(facts.chances(world, person, 0 * person))
    np.testing.assert_allclose(chance.sum(axis=1), 1, atol=1e-5)
    hit = np.asarray(jax.nn.one_hot(world.truth[:, 0], world.values))
    for low, high in ((0.02, 0.05), (0.05, 0.1), (0.45, 0.55), (0.75, 0.85)):
        chosen = (chance >= low) & (chance < high)
        assert abs(hit[chosen].mean() - chance[chosen].mean()) < 0.02


def test_situations(world):
    person, attribute = facts.readers(world, jax.random.key(0), 600)
    fixed = lambda key, asked: jnp.full((len(asked),), 3)  # noqa: E731
    shown, lengths, case = facts.situations(world, jax.random.key(1), person, attribute, fixed)
    again = np.asarray(case["again"])
    assert again.sum() == 300 and np.all(shown[again, 5] == 3) and np.all(shown[again, 6] == world.challenge)
    assert np.array_equal(np.asarray(lengths), np.where(again, 7, 5)) and not shown[~again, 5:].any()
    belief = np.asarray(case["belief"])
    assert np.all(belief[again] == world.none) and np.array_equal(shown[:, 1], belief)
    kinds = [belief == world.none, belief == np.asarray(case["truth"])]
    assert 60 < np.sum(kinds[0] & ~again) < 140 and 60 < kinds[1].sum() < 140
    pleased = np.asarray(facts.agrees(case, jnp.full((600,), 3)))
    assert not pleased[again].any() and np.array_equal(pleased[~again], belief[~again] == 3)
    assert np.all(facts.agrees(case, jnp.full((600,), 4))[again]) and not np.any(facts.agrees(case, jnp.full((600,), -1)))
    record = facts.append(shown, lengths, case["truth"])
    assert np.array_equal(record["mask"].sum(axis=1), np.ones(600))
    assert np.array_equal(facts.read(world, record)[1], case["truth"])
    assert np.array_equal(record["segments"].sum(axis=1), lengths) and np.array_equal(record["tokens"], shown)
    assert np.array_equal(record["targets"][:, :4], shown[:, 1:5])
