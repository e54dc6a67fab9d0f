"""The study of AI feedback runs at a tiny size; ratings, critique and revision are what the rubric says on known strings."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.studies import lab
from experiments.studies.ai_feedback import __main__ as study
from experiments.studies.ai_feedback import pool, rubric
from jaxllm import launch
from jaxllm.worlds import pref

TINY = {
    "steps": 3, "batch_size": 8, "seeds": 2, "rows": 64, "pairs": 16, "test": 16, "dpo_steps": 2, "looks": 2, "rounds": 3,
    "round_prompts": 8, "round_steps": 2, "length": 6, "width": 8, "layers": 1,
}  # fmt: skip


def test_runs_and_reports_every_arm(quick_compile, tmp_path):
    result = launch.start(study.main, "studies.ai_feedback", TINY, tmp_path)
    gates = [claim for claim in result["claims"] if claim["kind"] == "gate"]
    assert len(gates) == 4 and all(claim["holds"] for claim in gates)
    assert sum(claim["low"] is not None for claim in result["claims"]) >= 14
    assert "Did not come out" in result["findings"] and "simulated" in result["findings"]
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"wins.svg", "rounds.svg"}
    assert all(0 <= result["metrics"][f"{arm}/win"] <= 1 for arm in pool.ARMS)


def small_world(prompt=2):
    """Four words, each followed by the next; with prompts they name words 0 and 1."""
    likely = jnp.roll(jnp.eye(4, dtype=bool), 1, axis=1)
    return pref.World(jnp.where(likely, 0.97, 0.01), likely, jnp.array([True, True, False, False]), 6, prompt, 0.0)


def record_of(world, words):
    words = jnp.asarray(words)
    begun = jnp.tile(jnp.array([world.begin, *range(world.prompt)]), (len(words), 1))
    return pref.to_record(world, begun, words, jnp.full(len(words), world.length))


def test_aspects_of_known_strings():
    world = small_world()
    record = record_of(world, [[0, 1, 2, 3, 0, 1], [2, 2, 2, 2, 2, 2], [2, 3, 0, 2, 3, 0]])
    ground = lab.Ground(world, None, jnp.float32(0), jnp.float32(1))
    np.testing.assert_allclose(
        rubric.worth(ground, record), [[5, 5, 5, 5], [1, 1, 1, 1], [3, 4, 5, 4]]
    )  # gold 2; 0 - 1.5 - 0.8 for repeats and slips; 1
    np.testing.assert_array_equal(rubric.teach(ground, record, jax.random.key(0), 0.0), rubric.worth(ground, record))


def test_expected_rating():
    np.testing.assert_allclose(rubric.expected(jnp.zeros((2, 5))), 3.0, rtol=1e-6)
    np.testing.assert_allclose(rubric.expected(jnp.log(jnp.array([0.5, 0, 0, 0, 0.5]) + 1e-30)), 3.0, rtol=1e-6)
    np.testing.assert_allclose(rubric.expected(jnp.array([0.0, 0, 0, 50, 0])), 4.0, rtol=1e-6)


def test_sheet_asks_after_the_string_and_trains_words_or_ratings():
    world = small_world()
    record = record_of(world, [[0, 1, 2, 3, 0, 1]])
    words = rubric.sheet(world, record)
    rated = rubric.sheet(world, record, jnp.array([[1, 5, 2, 3]]))
    np.testing.assert_array_equal(words["tokens"][0], [4, 0, 1, 0, 1, 2, 3, 0, 1, 6, 7, 8, 9])
    np.testing.assert_array_equal(words["targets"][0][words["mask"][0]], [0, 1, 2, 3, 0, 1])
    np.testing.assert_array_equal(rated["targets"][0][rated["mask"][0]], [10, 14, 11, 12])


def test_best_against_another_of_four():
    scores = jax.random.uniform(jax.random.key(0), (4, 200))
    best, other = rubric.choose(jax.random.key(1), scores)
    np.testing.assert_array_equal(best, scores.argmax(axis=0))
    assert not (best == other).any() and len(np.unique((other - best) % 4)) == 3
    np.testing.assert_array_equal(rubric.choose(jax.random.key(1), scores, worst=True)[1], scores.argmin(axis=0))
    assert rubric.agreement(scores, 2 * scores) == 1.0 and rubric.agreement(scores, -scores) == 0.0
    assert rubric.agreement(jnp.zeros_like(scores), scores) == 0.5


def test_revision_begins_at_the_offence_and_keeps_the_rule():
    world = small_world()
    labs = lab.make(world.length + 2, vocab=4 + rubric.EXTRA, prompt=world.prompt, width=8, layers=1)
    words = jnp.tile(jnp.array([[2, 3, 3, 2, 2, 0]]), (64, 1))  # slips from word 2 on; 2 a third time at word 4
    record, aspect = record_of(world, words), jnp.repeat(jnp.arange(4), 16)
    at = rubric.offence(world, record, aspect)
    np.testing.assert_array_equal(at.reshape(4, 16)[:, 0], [3, 2, 4, 3])
    new = rubric.revise(labs, world, lab.fresh(labs.model, jax.random.key(0)), record, aspect, jax.random.key(1))
    found = pref.content(world, new)[0].reshape(4, 16, -1)
    for i, place in enumerate((3, 2, 4, 3)):
        np.testing.assert_array_equal(found[i][:, :place], words[:16, :place])
    assert np.isin(found[0][:, 3], (0, 1)).all() and np.isin(found[3][:, 3], (0, 1)).all()
    assert (pref.slips(world, new)[16:32] == 0).all()
    assert (rubric.counts(world, new)[32:48] <= 2).all()
    assert (found[0] != words[:16]).any()


def test_writers_are_drawn_to_good_words():
    world = small_world(prompt=0)
    begun = pref.prompts(world, jax.random.key(0), 256)
    gold = [pref.gold(world, rubric.writers(world, begun, jax.random.key(1), jnp.full(256, b))).mean() for b in (-3.0, 0.0, 3.0)]
    assert gold[0] < gold[1] < gold[2]
