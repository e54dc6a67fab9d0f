"""The study of backtracking runs at a tiny size; lessons and pairs are what the paper says; a bias moves one token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.studies.backtracking import get_config
from experiments.studies import backtracking
from experiments.studies.lab import reset_runs, resets
from jaxllm import launch
from jaxllm.core import ops, spec
from jaxllm.losses import preference
from jaxllm.worlds import hazard

TINY = {
    "seeds": 2, "words": 24, "dangerous": 8, "read_steps": 2, "read_batch": 8, "tune_steps": 2, "batch_size": 8, "dpo_steps": 2,
    "pair_batch": 8, "test_requests": 16, "width": 16, "layers": 1, "biases": (4.0,),
}  # fmt: skip


def test_runs_and_reports_every_arm(quick_compile, tmp_path):
    result = launch.start(backtracking.main, "studies.backtracking", TINY, tmp_path)
    assert all(claim["low"] <= claim["value"] <= claim["high"] for claim in result["claims"] if claim["low"] is not None)
    assert [claim["kind"] for claim in result["claims"]].count("gate") == 2 and len(result["claims"]) == 13
    assert "Did not come out" in result["findings"] and "simulated" in result["findings"]
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"attack.svg", "bias.svg"}
    metrics = result["metrics"]
    assert set(backtracking.ARMS) < {name.split("/")[0] for name in metrics}
    assert all(0 <= metrics[f"{arm}/attack"] <= 1 for arm in backtracking.ARMS)


@pytest.fixture(scope="module")
def c():
    c = get_config()
    c.width, c.layers = 16, 1
    return c


@pytest.fixture(scope="module")
def world(c):
    return reset_runs.made(c, jax.random.key(0))


COLUMNS = ("tokens", "targets", "segments", "mask")


def rows_of(world, record):
    """[(names, trained tokens, answer before these)] of a record."""
    out = []
    for tokens, targets, segments, mask in zip(*(np.asarray(record[n]) for n in COLUMNS), strict=True):
        n = int(segments.sum())
        answer, trained = targets[world.request - 1 : n].tolist(), int(mask.sum())
        assert mask[n - trained : n].all()
        names = (tokens[hazard.CUES : world.request] - world.names).tolist()
        out.append((names, answer[len(answer) - trained :], answer[: len(answer) - trained]))
    return out


def answers(world, words):
    """(whether these words are a hazard, their compliance, their refusal)."""
    kinds = np.asarray(world.danger)[words]
    return (kinds >= 0).sum() > 1, [*words, world.end], [world.refuse, world.reasons + max(0, *kinds), world.end]


def test_lessons_train_what_follows_a_prefix_that_is_taken_back_and_not_the_prefix(c, world):
    rows = rows_of(world, resets.lessons(world, c, jax.random.key(1), 600, jnp.float32(0.5)))
    seen = {"back": 0, "refuse": 0, "comply": 0}
    for words, trained, before in rows:
        bad, comply, refuse = answers(world, words)
        if before:
            assert bad and trained == [world.reset, *refuse] and before == comply[: len(before)] and len(before) <= world.steps
        else:
            assert trained == (refuse if bad else comply)
        seen["back" if before else "refuse" if bad else "comply"] += 1
    assert abs(seen["back"] / 600 - 0.15) < 0.07 and abs(seen["refuse"] / 600 - 0.15) < 0.07
    plain = rows_of(world, resets.lessons(world, c, jax.random.key(1), 200, jnp.float32(0)))
    assert not any(before or world.reset in trained for _, trained, before in plain)


def test_pairs_ask_to_take_back_what_is_wrong_and_nothing_else(c, world):
    pairs = resets.pairs(world, c, jax.random.key(2), 200, jnp.int32(resets.BACKTRACK))
    for i, (one, other) in enumerate(zip(rows_of(world, pairs["chosen"]), rows_of(world, pairs["rejected"]), strict=True)):
        assert one[0] == other[0] and not one[2] and not other[2]  # one topic, and all of both sides counts
        bad, comply, refuse = answers(world, one[0])
        right, wrong = (refuse, comply) if bad else (comply, refuse)
        assert bad == (i % 2 == 0 or i % 8 == 1)
        longer, plain, end = (one[1], other[1], right) if i % 2 == 0 else (other[1], one[1], wrong)
        kept = longer.index(world.reset)
        assert plain == (wrong if i % 2 == 0 else right)
        assert 0 < kept < len(plain) and longer == [*plain[:kept], world.reset, *end]
        weights = np.asarray(pairs["nll_weights"])[i]
        assert np.flatnonzero(weights)[0] == world.request - 1 + (kept if i % 2 == 0 else 0)
        assert (weights > 0).sum() == len(one[1]) - (kept if i % 2 == 0 else 0)


def test_plain_pairs_hold_no_reset_and_a_coin_swaps_half(c, world):
    plain = resets.pairs(world, c, jax.random.key(3), 100, jnp.int32(resets.PLAIN))
    for i, (one, other) in enumerate(zip(rows_of(world, plain["chosen"]), rows_of(world, plain["rejected"]), strict=True)):
        bad, comply, refuse = answers(world, one[0])
        assert bad == (i % 2 == 0) and [one[1], other[1]] == ([refuse, comply] if bad else [comply, refuse])
    ordered, coin = (resets.pairs(world, c, jax.random.key(4), 400, jnp.int32(k)) for k in (resets.BACKTRACK, resets.COIN))
    kept = np.asarray(jnp.all(ordered["chosen"]["targets"] == coin["chosen"]["targets"], axis=1))
    assert 0.4 < kept.mean() < 0.6
    same = np.asarray(jnp.all(ordered["rejected"]["targets"] == coin["chosen"]["targets"], axis=1))
    np.testing.assert_array_equal(same, ~kept)


def test_a_prefix_that_both_sides_share_does_not_enter_dpo(c, world):
    model = reset_runs.make(world.vocab, c)
    params = spec.init(model.specs, jax.random.key(5))
    pairs = resets.pairs(world, c, jax.random.key(6), 16, jnp.int32(resets.BACKTRACK))
    shared = pairs["chosen"]["targets"] == pairs["rejected"]["targets"]
    shared = jnp.cumprod(shared, axis=1).astype(bool)
    assert bool((shared & pairs["chosen"]["mask"]).any(axis=1).all())
    cut = {side: {**pairs[side], "mask": pairs[side]["mask"] & ~shared} for side in ("chosen", "rejected")}

    def margin(params, pairs):
        a, b = (preference.sequence_logps(model, params, pairs[side]) for side in ("chosen", "rejected"))
        return jnp.sum(jnp.tanh(a - b))

    whole, rest = (jax.grad(margin)(params, p) for p in (pairs, cut))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), whole, rest)


def test_a_bias_adds_to_one_logit(c, world):
    model = reset_runs.make(world.vocab, c)
    params, hidden = spec.init(model.specs, jax.random.key(7)), jnp.ones((2, c.width))
    plain = ops.logits(model.head(params), hidden)
    moved = ops.logits(reset_runs.biased(model, world.reset, jnp.float32(3.0)).head(params), hidden)
    expected = np.zeros(plain.shape[-1])
    expected[world.reset] = 3.0
    np.testing.assert_allclose(moved - plain, np.tile(expected, (2, 1)), atol=1e-5)
