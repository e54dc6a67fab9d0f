"""One iteration of online RL: rollout, scores, and several epochs of updates, as one step of the loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm.core.types import mean_of
from jaxllm.train.loop import fit
from jaxllm.train.online import make_online_step, masked_sum
from jaxllm.train.step import init_state, make_train_step

EPOCHS, MINIBATCHES, ROWS = 3, 2, 8


@pytest.fixture
def online():
    """A policy of one number; seen keeps what every function was given."""
    seen = {"rollout": [], "scores": [], "rows": []}
    tx = optax.chain(optax.sgd(0.1), optax.scale_by_schedule(lambda count: 1.0))

    def loss_fn(params, batch, rng):
        jax.debug.callback(lambda x: seen["rows"].append(np.asarray(x).tolist()), batch["id"])
        mean = mean_of((params["w"] - batch["target"]) ** 2)
        ratio = jnp.full(batch["id"].shape, 1.0) + jnp.abs(params["w"] - batch["old"])
        return mean, {"loss": mean, "val/ratio": mean_of(ratio)}

    def rollout(params, prompts, key):
        seen["rollout"].append(np.asarray(jax.random.key_data(key)).tolist())
        return {"id": prompts, "old": jnp.full(prompts.shape, params["w"])}

    def reward(frozen, samples):
        scores = frozen["target"] * jnp.ones(samples["id"].shape)
        seen["scores"].append(np.asarray(scores))
        return scores

    def prepare(params, frozen, samples, scores):
        return {**samples, "target": scores}, {"objective/scores": mean_of(scores)}

    update = jax.jit(make_train_step(loss_fn, tx), donate_argnums=0)
    state, _ = init_state({"w": jnp.float32(0.0)}, tx)
    return (
        make_online_step(rollout, reward, prepare, update, epochs=EPOCHS, minibatches=MINIBATCHES),
        state,
        seen,
    )


def test_an_iteration_is_epochs_times_minibatches_updates(online):
    step, state, seen = online
    frozen = {"target": jnp.float32(1.0)}
    for iteration in range(2):
        state, metrics = step(state, frozen, jnp.arange(ROWS), jax.random.key(0))
        assert int(state.step) == iteration + 1, "state.step counts iterations"
    jax.effects_barrier()
    assert int(state.opt_state[1].count) == 2 * EPOCHS * MINIBATCHES, "the optimizer counts updates"
    assert len(seen["rollout"]) == 2 and seen["rollout"][0] != seen["rollout"][1], (
        "every iteration has its own key"
    )
    updates = 2 * EPOCHS * MINIBATCHES
    assert state.params["w"] == pytest.approx(1 - 0.8**updates, rel=1e-5)
    epochs = [sorted(seen["rows"][i] + seen["rows"][i + 1]) for i in range(0, updates, 2)]
    assert epochs == [list(range(ROWS))] * (2 * EPOCHS), "an epoch sees every row once"
    assert len({str(rows) for rows in seen["rows"]}) > 2, "every epoch has its own order"
    assert metrics["loss"].count == EPOCHS * ROWS and metrics["objective/scores"].value() == 1


def test_the_first_update_is_reported_alone(online):
    step, state, _ = online
    _, metrics = step(state, {"target": jnp.float32(1.0)}, jnp.arange(ROWS), jax.random.key(0))
    assert metrics["first/val/ratio"].value() == 1.0, (
        "before the first update the policy is the one that sampled"
    )
    assert metrics["val/ratio"].value() > 1.1
    assert "first/loss" not in metrics


def test_it_is_a_step_of_the_loop(online):
    step, state, _ = online
    logged = {}
    after = fit(
        step, state, {"target": jnp.float32(1.0)}, lambda i: jnp.arange(ROWS), jax.random.key(0), steps=3,
        log_every=1, log=lambda i, values: logged.__setitem__(i, values["loss"]),
    )  # fmt: skip
    assert int(after.step) == 3 and sorted(logged) == [1, 2, 3] and logged[3] < logged[1]


def test_masked_sum():
    values = jnp.array([[1.0, jnp.nan], [2.0, 3.0]])
    np.testing.assert_array_equal(masked_sum(values, jnp.array([[True, False], [True, True]])), [1, 5])
