"""The simulated raters: every aspect between 1 and 5, the best answer rated best, and each habit seen by its aspect."""

from jaxllm.worlds import instr
from jaxllm.worlds.instr_labelers import ramble
from jaxllm.worlds.instr_rubric import ASPECTS, best_answer, rate, rated
from jaxllm.worlds.instr_words import seeded

TASKS = instr.tasks("train", 200, seed=3)


def test_ratings_are_five_levels_of_four_aspects_and_repeat():
    rows = rated(100, seed=1)
    assert rows == rated(100, seed=1) != rated(100, seed=2)
    assert all(tuple(r["ratings"]) == ASPECTS and set(r["ratings"].values()) <= {1, 2, 3, 4, 5} for r in rows)
    for aspect in ASPECTS:
        assert len({r["ratings"][aspect] for r in rows}) > 1
    assert all(r["task"]["split"] == "train" for r in rows)


def test_the_better_answer_is_never_rated_lower():
    for row in rated(200, seed=5):
        better = rate(row["task"], row["better"])
        assert sum(better.values()) >= sum(row["ratings"].values())


def test_each_aspect_sees_its_own_fault():
    plain = next(t for t in TASKS if t["kind"] == "plain")
    unsafe = next(t for t in TASKS if t["kind"] == "unsafe")
    good = rate(plain, plain["answer"])
    assert set(good.values()) == {5} and set(rate(unsafe, best_answer(unsafe)).values()) <= {4, 5}
    rambling = rate(plain, ramble(seeded("x", 0), plain["answer"]))
    assert rambling["honesty"] < good["honesty"] and rambling["truthfulness"] == 5
    refusing = rate(plain, instr.REFUSALS[0])
    assert refusing["helpfulness"] == 1 and refusing["truthfulness"] == 4
    assert rate(unsafe, instr.compliance(unsafe))["honesty"] == 1
    assert rate(plain, "What is\nthis?", ended=False)["instruction following"] == 1
