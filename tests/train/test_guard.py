"""The guard: what is not finite, and what is a spike, never reaches the weights; and what is neither always does."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm.core.types import Mean
from jaxllm.train import guard, loop, moments, optim
from jaxllm.train.guard import Streak, guarded
from jaxllm.train.loop import fetch
from jaxllm.train.step import init_state, make_train_step

KEY = jax.random.key(0)


def loss_fn(params, batch, key):
    """Linear in w: the gradient is the batch's mean."""
    return Mean(jnp.sum(params["w"] * batch["x"]) + params["zero"] * 0, jnp.float32(len(batch["x"]))), {}


def params():
    return {"w": jnp.float32(1.0), "zero": jnp.float32(-0.0)}


def make(tx=None, accumulate=1, **options):
    tx = guarded(tx or optim.adamw(1e-2), **options)
    state, _ = init_state(params(), tx)
    return state, jax.jit(make_train_step(loss_fn, tx, accumulate=accumulate), donate_argnums=0)


def run(state, step, values):
    """The states' bits and the metrics of each step."""
    seen = []
    for value in values:
        state, metrics = step(state, {}, {"x": jnp.full(4, value, jnp.float32)}, KEY)
        seen.append((bits(state), fetch([metrics])))
    return state, seen


def bits(state, only_inner=True):
    inner = state.opt_state.inner if only_inner else state.opt_state
    return [np.asarray(x).tobytes() for x in jax.tree.leaves((state.params, inner))]


def usual(n, seed=0):
    return np.random.default_rng(seed).normal(1.0, 0.1, n)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_changes_no_bit_and_the_next_one_does(value, accumulate):
    state, step = make(accumulate=accumulate)
    _, seen = run(state, step, [1.0, value, value, 1.0])
    (first, _), (second, bad), (third, _), (fourth, good) = seen
    assert first == second == third != fourth
    assert bad["guard/skipped"] == bad["guard/nonfinite"] == 1 and good["guard/skipped"] == good["guard/nonfinite"] == 0


def test_without_the_guard_the_weights_would_be_lost():
    state, _ = init_state(params(), optim.adamw(1e-2))
    after, metrics = make_train_step(loss_fn, optim.adamw(1e-2))(state, {}, {"x": jnp.full(4, jnp.nan)}, KEY)
    assert np.isnan(after.params["w"]) and "guard/skipped" not in metrics


def test_one_row_that_is_not_finite_is_enough():
    state, step = make()
    before = bits(state)
    state, metrics = step(state, {}, {"x": jnp.array([1.0, 1.0, jnp.nan, 1.0])}, KEY)
    assert bits(state) == before and int(state.step) == 1 and float(metrics["guard/nonfinite"].total) == 1


def test_a_run_with_bad_steps_is_the_run_without_them():
    values = usual(60)
    with_bad = np.insert(values, [5, 5, 40], [np.nan, np.inf, 50.0])
    state, step = make()
    a, seen = run(state, step, with_bad)
    state, step = make()
    b, _ = run(state, step, values)
    assert bits(a) == bits(b) and int(a.step) == 63 and int(b.step) == 60
    np.testing.assert_array_equal(a.opt_state.window, b.opt_state.window)  # neither enters the window
    skipped = [i for i, (_, m) in enumerate(seen) if m["guard/skipped"]]
    assert skipped == [5, 6, 42]
    assert [i for i, (_, m) in enumerate(seen) if m["guard/nonfinite"]] == [5, 6]


def test_a_spike_is_skipped_only_against_enough_steps_and_only_above_sigma():
    for n, spike, sigma, skipped in ((60, 2.0, 6.0, 1), (60, 1.3, 6.0, 0), (60, 2.0, 0.0, 0), (guard.LEAST - 2, 2.0, 6.0, 0)):
        state, step = make(sigma=sigma)
        _, seen = run(state, step, [*usual(n), spike])
        assert sum(m["guard/skipped"] for _, m in seen) == skipped, (n, spike, sigma)


def test_a_new_level_is_accepted_after_a_few_and_then_is_the_level():
    state, step = make()
    levels = [*usual(50), *(usual(60, 1) + 9), 30.0]
    _, seen = run(state, step, levels)
    skipped = [i for i, (_, m) in enumerate(seen) if m["guard/skipped"]]
    assert skipped == [*range(50, 50 + guard.SPIKES), 110]


def test_steps_without_a_gradient_do_not_make_the_first_one_a_spike():
    state, step = make(optax.sgd(0.1))
    _, seen = run(state, step, [*np.zeros(80), 1.0, 1.0])
    assert not any(m["guard/skipped"] for _, m in seen)


def test_a_quiet_loss_may_rise_a_little():
    state, step = make(optax.sgd(0.0))
    _, seen = run(state, step, [*np.full(80, 1.0), 1.04, 1.2])
    assert [m["guard/skipped"] for _, m in seen[-2:]] == [0, 1]


@pytest.mark.parametrize("around", [lambda tx: moments.stored(tx, "bfloat16"), lambda tx: tx])
def test_what_stands_around_the_guard_hands_the_loss_on(around):
    tx = around(guarded(optim.adamw(1e-2)))
    state, _ = init_state({"w": jnp.ones(3)}, tx)

    def loss(params, batch, key):
        return Mean(jnp.sum(params["w"]) * batch["x"].sum(), jnp.float32(1)), {}

    step = jax.jit(make_train_step(loss, tx))
    state, _ = step(state, {}, {"x": jnp.ones(2)}, KEY)
    after, metrics = step(state, {}, {"x": jnp.full(2, jnp.nan)}, KEY)
    assert float(metrics["guard/nonfinite"].total) == 1
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state.inner), (after.params, after.opt_state.inner))


# ---- the end after several


def host(bad, count=1):
    return {"guard/nonfinite": Mean(np.float32(bad), np.float32(count))}


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([0, 1, 1, 1], Streak(11, 3)),
        ([1, 1, 0, 1], Streak(13, 1)),
        ([1] * 6, Streak(10, 5)),
        ([1, 1, 1, 1, 1, 0], Streak(10, 5)),  # five in a row end it, whatever came then
        ([0, 0], Streak()),
    ],
)
def test_streaks(steps, expected):
    assert guard.follow(Streak(), 10, [host(b) for b in steps], 5) == expected


def test_a_streak_goes_on_over_logs_and_counts_updates():
    streak = guard.follow(Streak(), 0, [host(0, 4), host(4, 4)], 5)
    assert streak == Streak(1, 4) and guard.follow(streak, 2, [host(4, 4)], 5) == Streak(1, 8)
    assert guard.follow(streak, 2, [host(3, 4)], 5) == Streak() and guard.follow(streak, 2, [{}], 5) == Streak()


@pytest.mark.parametrize("log_every", [1, 4])
def test_the_loop_saves_and_ends_with_the_first_of_the_bad_steps(log_every):
    state, step = make()
    saved = []
    batches = lambda i: {"x": jnp.full(4, 1.0 if i < 6 else np.nan)}  # noqa: E731
    fit = partial(loop.fit, step, state, {}, batches, KEY, steps=40, log=lambda *_: None, log_every=log_every)
    with pytest.raises(guard.NonFinite) as error:
        fit(save=lambda s: saved.append((int(s.step), float(s.params["w"]))))
    assert (error.value.first, error.value.updates) == (6, 5) and "from step 7 on" in str(error.value)
    assert saved[-1][0] == {1: 11, 4: 12}[log_every] and np.isfinite(saved[-1][1])


def test_the_guard_adds_no_program_and_no_transfer():
    state, step = make()
    batch = {"x": jnp.ones(4)}
    state, _ = step(state, {}, batch, KEY)
    with jax.transfer_guard("disallow"):
        for _ in range(3):
            state, _ = step(state, {}, batch, KEY)
    assert step._cache_size() == 1
