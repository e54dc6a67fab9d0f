"""The length study runs at a tiny size; worth for its length, balanced pairs and gains within bins on known cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies import lab, length_bias
from experiments.studies.lab.lengths import balanced, within_bins
from jaxllm import launch
from jaxllm.worlds import pref

TINY = {
    "steps": 2, "every": 2, "batch_size": 8, "seeds": 2, "pretrain_steps": 4, "judge_steps": 4, "pairs": 64, "test_strings": 32,
    "length": 8, "shortest": 4, "width": 16, "layers": 1,
}  # fmt: skip


def test_runs_and_reports_every_claim_with_its_interval(quick_compile, tmp_path):
    result = launch.start(length_bias.main, "studies.length_bias", TINY, tmp_path)
    kinds = [claim["kind"] for claim in result["claims"]]
    assert set(kinds) == {"gate", "finding"} and kinds.count("gate") == 2
    assert all(claim["low"] <= claim["value"] <= claim["high"] for claim in result["claims"] if claim["kind"] == "finding")
    assert "Did not come out" in result["findings"] and "simulated" in result["findings"]
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"length.svg", "worth.svg"}
    assert result["metrics"]["biased/kl"] > 0


@pytest.fixture(scope="module")
def world():
    return pref.make(jax.random.key(0), length=8, stop=0.2, shortest=5)


def strings(world, key, n=4096):
    first, second = jax.random.split(key)
    return pref.to_record(world, pref.prompts(world, first, n), *pref.strings(world, second, n))


def test_quality_is_that_of_the_first_words_and_the_same_at_every_length(world):
    scale, record = lab.length_scale(world, jax.random.key(1)), strings(world, jax.random.key(2))
    quality, words = np.asarray(lab.quality(world, scale, record)), np.asarray(pref.lengths(world, record))
    good = [len({w for w in row[:3] if world.good[w]}) for row in np.asarray(record["targets"]).tolist()]  # 3 words: no penalty
    np.testing.assert_allclose(quality, (np.array(good) - float(scale.worth_mean)) / float(scale.worth_std), atol=1e-5)
    assert words.min() == 5 and max(abs(quality[words == n].mean()) for n in range(5, 9)) < 0.2
    assert abs(np.corrcoef(quality, words)[0, 1]) < 0.05 < np.corrcoef(pref.gold(world, record), words)[0, 1]
    assert abs(lab.standard_length(world, scale, record).mean()) < 0.1


def test_balanced_pairs_choose_the_longer_side_half_of_the_time(world):
    a, b = (strings(world, jax.random.key(k)) for k in (3, 4))
    longer = (pref.lengths(world, a) > pref.lengths(world, b)) ^ jax.random.bernoulli(jax.random.key(5), 0.2, (4096,))
    pick = lambda yes: jax.tree.map(lambda x, y: jnp.where(yes[:, None], x, y), a, b)  # noqa: E731
    pairs = {"chosen": pick(longer), "rejected": pick(~longer)}

    def share(pairs):
        gap = pref.lengths(world, pairs["chosen"]) - pref.lengths(world, pairs["rejected"])
        return {n: float(jnp.sum(gap == n) / jnp.sum(jnp.abs(gap) == n)) for n in (1, 2, 3)}

    before, after = share(pairs), share(balanced(world, pairs, jax.random.key(6), 1))
    assert min(before.values()) > 0.7
    assert max(abs(x - 0.5) for x in after.values()) < 0.06


def test_gain_within_bins_leaves_out_what_moving_between_them_brings():
    words = np.array([[1, 1, 1, 9], [1, 9, 9, 9]])
    only_length = np.where(words > 5, 2.0, 0.0)
    assert only_length[1].mean() - only_length[0].mean() == 1.0
    assert within_bins(only_length, words, 3) == 0.0
    assert within_bins(np.array([[0.0] * 4, [1.0] * 4]), words, 3) == 1.0
    assert np.isnan(within_bins(only_length[:, :1], np.array([[1], [9]]), 3))
