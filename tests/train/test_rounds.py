"""Rounds over plain functions, and the selections on planted scores."""

import numpy as np
import pytest

from jaxllm.train import rounds

RIGHT = np.array([[True, False, True, True], [False] * 4, [False, True, False, False]])
LENGTHS = np.array([[5, 1, 2, 9], [1, 2, 3, 4], [1, 7, 2, 2]])
RNG = np.random.default_rng(0)


def run(start_of, n=3, empty=()):
    """Policies are numbers: training adds the chosen rows to where it starts."""
    seen = []

    def select(samples, scores, index):
        chosen = [] if index in empty else [x for x, s in zip(samples, scores, strict=True) if s > 0]
        return chosen, {"share": len(chosen) / len(samples)}

    done = rounds.rounds(
        10, n, sample=lambda policy, index: [policy, policy + 1, -policy], score=lambda samples, index: np.sign(samples),
        select=select, train=lambda start, policy, chosen, index: start_of(start, policy) + len(chosen), report=seen.append,
    )  # fmt: skip
    assert seen == done
    return done


def test_from_the_latest_and_from_the_base():
    latest = run(lambda start, policy: policy)
    assert [(r.index, r.policy, r.trained) for r in latest] == [(0, 10, 12), (1, 12, 14), (2, 14, 16)]
    assert latest[1].chosen == [12, 13] and latest[0].metrics == {"share": 2 / 3}
    base = run(lambda start, policy: start)
    assert [(r.policy, r.trained) for r in base] == [(10, 12), (12, 12), (12, 12)], "each round trains from the very first"


def test_a_round_without_rows_keeps_its_policy():
    assert [(r.policy, r.trained) for r in run(lambda start, policy: policy, empty=(1,))] == [(10, 12), (12, 12), (12, 14)]


def test_the_right_samples():
    np.testing.assert_array_equal(rounds.every(RIGHT, LENGTHS, RNG), RIGHT)
    np.testing.assert_array_equal(np.argwhere(rounds.shortest(RIGHT, LENGTHS, RNG)), [[0, 2], [2, 1]])
    np.testing.assert_array_equal(np.argwhere(rounds.longest(RIGHT, LENGTHS, RNG)), [[0, 3], [2, 1]])


def test_random_selections():
    counts = sum(rounds.at_random(RIGHT, LENGTHS, np.random.default_rng(i)).astype(int) for i in range(600))
    assert (counts[~RIGHT] == 0).all() and counts.sum(axis=1).tolist() == [600, 0, 600]
    assert (np.abs(counts[0][RIGHT[0]] - 200) < 60).all()
    control = sum(rounds.unfiltered(RIGHT, LENGTHS, np.random.default_rng(i)).astype(int) for i in range(400))
    assert (control.sum(axis=1) == 400).all() and (np.abs(control - 100) < 50).all(), "right or wrong alike"


def test_what_is_solved():
    found = rounds.solved(RIGHT, np.ones_like(RIGHT), LENGTHS)
    assert found["accuracy"] == 4 / 12 and found["coverage"] == pytest.approx(2 / 3)
    assert found["mean_length"] == LENGTHS.mean() and found["mean_right_length"] == (5 + 2 + 9 + 7) / 4
    assert np.isnan(rounds.solved(np.zeros_like(RIGHT), RIGHT, LENGTHS)["mean_right_length"])


def test_what_is_excluded_is_not_wrong():
    valid = RIGHT | (np.arange(4) == 0).reshape(1, 4)
    valid[1] = False
    found = rounds.solved(RIGHT, valid, LENGTHS)
    assert found["accuracy"] == 4 / 5 and found["coverage"] == 1
    assert np.isnan(rounds.solved(RIGHT, np.zeros_like(RIGHT), LENGTHS)["accuracy"])


def test_pairs_leave_out_ties_and_excluded_scores():
    scores = np.array([[1.0, 3.0, np.nan, 2.0], [2.0, 2.0, 2.0, np.nan], [np.nan] * 4, [np.nan, 0.0, np.nan, 1.0]])
    pairs, use = rounds.best_and_worst(scores, RNG)
    assert use.tolist() == [True, False, False, True] and pairs[use].tolist() == [[1, 0], [3, 1]]
    drawn = [rounds.best_and_other(scores, np.random.default_rng(i)) for i in range(50)]
    assert all(use.tolist() == [True, False, False, True] for _, use in drawn)
    assert {tuple(pairs[0]) for pairs, _ in drawn} == {(1, 0), (1, 3)} and {tuple(pairs[3]) for pairs, _ in drawn} == {(3, 1)}
