"""The frontier: hulls against scipy-free geometry, areas by hand, what mixing allows."""

import numpy as np

from jaxllm.evals import frontier

RNG = np.random.default_rng(0)


def test_pareto_keeps_what_nothing_beats():
    kl, reward = np.array([1, 2, 2, 3, 0.5]), np.array([1, 0.9, 1.5, 1.5, 0.2])
    np.testing.assert_array_equal(frontier.pareto(kl, reward), [4, 0, 2])
    kl, reward = RNG.random((2, 40))
    kept = set(frontier.pareto(kl, reward).tolist())
    beaten = {
        i for i in range(40)
        if any((kl[j] <= kl[i]) and (reward[j] >= reward[i]) and j != i for j in range(40))
    }  # fmt: skip
    assert kept == set(range(40)) - beaten


def test_the_hull_is_the_best_mixture():
    kl, reward = 5 * RNG.random(12), RNG.normal(size=12)
    points = [(0.0, 0.0), *zip(kl, reward, strict=True)]
    for at in (0.3, 1.7, 4.0, 6.0):
        best = -np.inf  # over all mixtures of two policies that keep the mean KL at or under `at`
        for x1, y1 in points:
            for x2, y2 in points:
                if x1 > at:
                    continue
                w = 1.0 if x2 <= at else (at - x1) / (x2 - x1)
                best = max(best, y1, (1 - w) * y1 + w * y2)
        np.testing.assert_allclose(frontier.reward_at(kl, reward, at), best, atol=1e-9)


def test_areas_by_hand():
    # 0 -> (1, 1) -> (3, 2), level after that; the point at (2, 1.2) lies under the hull
    kl, reward = [1, 3, 2, 5], [1, 2, 1.2, 0.5]
    np.testing.assert_allclose(frontier.hull_area(kl, reward, 1), 0.5)
    np.testing.assert_allclose(frontier.hull_area(kl, reward, 2), 0.5 + 1.25)
    np.testing.assert_allclose(frontier.hull_area(kl, reward, 4), 0.5 + 3 + 2)
    np.testing.assert_allclose(frontier.hull_area(kl, np.array(reward) + 1, 4, base=1.0), 5.5)
    assert frontier.hull_area([2.0], [-1.0], 3) == 0  # the reference is always there
    np.testing.assert_allclose(frontier.hull_area([-0.01], [0.5], 2), 1.0)  # an estimate below 0 counts as 0


def test_intervals_over_seeds():
    curves = [(np.array([1.0, 2.0]), np.array([1.0, 1.5]) + d) for d in (-0.1, 0.0, 0.1)]
    areas = [frontier.hull_area(kl, r, 2) for kl, r in curves]
    got = frontier.area_interval(curves, 2)
    np.testing.assert_allclose(got.mean, np.mean(areas))
    assert got.low < got.mean < got.high and got.n == 3
    band = frontier.curve_band(curves, [1.0, 2.0])
    np.testing.assert_allclose([i.mean for i in band], [1.0, 1.5])
