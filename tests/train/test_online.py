"""One iteration of online RL: rollout, scores, and several epochs of updates, as one step of the loop."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm.core.types import Mean, mean_of
from jaxllm.losses import policy
from jaxllm.train.loop import fit
from jaxllm.train.online import make_online_step, masked_sum, once, remembering, until_informative
from jaxllm.train.step import init_state, make_train_step
from tests.losses import bigram

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
    assert len(seen["rollout"]) == 2 and seen["rollout"][0] != seen["rollout"][1], "every iteration has its own key"
    updates = 2 * EPOCHS * MINIBATCHES
    assert state.params["w"] == pytest.approx(1 - 0.8**updates, rel=1e-5)
    epochs = [sorted(seen["rows"][i] + seen["rows"][i + 1]) for i in range(0, updates, 2)]
    assert epochs == [list(range(ROWS))] * (2 * EPOCHS), "an epoch sees every row once"
    assert len({str(rows) for rows in seen["rows"]}) > 2, "every epoch has its own order"
    assert metrics["loss"].count == EPOCHS * ROWS and metrics["objective/scores"].value() == 1


def test_the_first_update_is_reported_alone(online):
    step, state, _ = online
    _, metrics = step(state, {"target": jnp.float32(1.0)}, jnp.arange(ROWS), jax.random.key(0))
    assert metrics["first/val/ratio"].value() == 1.0, "before the first update the policy is the one that sampled"
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


def sampling(informative_prompts, prompts, parts, group=2):
    """until_informative on prompts that are numbers; a group has a signal when its prompt is among informative_prompts."""
    calls = []

    def rollout(params, mine, key):
        calls.append(np.asarray(jax.random.key_data(key)).tolist())
        return {"id": jnp.repeat(mine, group), "row": jnp.arange(len(mine) * group).reshape(-1, 1)}

    def reward(frozen, samples):
        return {"scores": samples["id"] * 10.0, "valid": samples["id"] >= 0}

    def informative(scores):
        return jnp.isin(scores["scores"][::group] / 10, jnp.asarray(informative_prompts, jnp.float32))

    samples, scores, metrics = until_informative(
        rollout, reward, None, None, jnp.asarray(prompts), jax.random.key(0), informative=informative, parts=parts
    )
    assert len({str(c) for c in calls}) == len(calls), "every part has its own key"
    np.testing.assert_array_equal(scores["scores"], samples["id"] * 10.0)
    return samples["id"].tolist(), metrics["sampling/parts"].value(), metrics["sampling/informative"].value()


def test_dynamic_sampling_goes_on_until_every_group_has_a_signal():
    # parts of two prompts: (1, 2), (3, 4), (5, 6), (7, 8)
    ids, parts, share = sampling([2, 5, 6], range(1, 9), 4)
    assert ids == [2, 2, 5, 5] and parts == 3 and share == 1, "and does not draw the fourth part"
    ids, parts, share = sampling([1, 2], range(1, 9), 4)
    assert ids == [1, 1, 2, 2] and parts == 1 and share == 1


def test_dynamic_sampling_stops_where_the_prompts_do():
    ids, parts, share = sampling([8], range(1, 9), 4)
    assert ids == [8, 8, 1, 1] and parts == 4 and share == 0.5, "what has no signal fills up, and is counted"


def memory_step(observe):
    """A policy of one number whose loss follows the memory, and its state."""
    tx = remembering(optax.sgd(0.1), {"coef": jnp.float32(1.0)})
    seen = []

    def prepare(params, frozen, samples, scores):
        seen.append(float(frozen["memory"]["coef"]))
        batch = {"target": jnp.full(4, frozen["memory"]["coef"])}
        return batch, {"objective/kl": mean_of(batch["target"]), "coef": Mean(frozen["memory"]["coef"], jnp.float32(1))}

    def loss_fn(params, batch, rng):
        mean = mean_of((params["w"] - batch["target"]) ** 2)
        return mean, {"loss": mean}

    update = jax.jit(make_train_step(loss_fn, tx), donate_argnums=0)
    step = make_online_step(
        lambda params, prompts, key: prompts, lambda frozen, samples: samples, prepare,
        update, epochs=1, minibatches=2, observe=observe,
    )  # fmt: skip
    return step, init_state({"w": jnp.float32(0.0)}, tx)[0], seen


def test_what_is_remembered_reaches_the_next_iteration_and_is_part_of_the_state():
    double = lambda memory, metrics: {"coef": memory["coef"] + metrics["objective/kl"].value()}  # noqa: E731
    step, state, seen = memory_step(double)
    for iteration in range(3):
        state, metrics = step(state, {}, jnp.zeros(4), jax.random.key(0))
        assert metrics["coef"].value() == 2.0**iteration, "metrics outlive the update, which donates its state"
    assert seen == [1.0, 2.0, 4.0] and state.opt_state.memory["coef"] == 8.0
    # a copy, as a checkpoint is: the run continues as if it had not stopped
    resumed = jax.tree.map(jnp.copy, state)
    one, _ = step(state, {}, jnp.zeros(4), jax.random.key(0))
    two, _ = step(resumed, {}, jnp.zeros(4), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_a_memory_that_stays_as_it_is_can_be_read_after_the_update():
    step, state, _ = memory_step(lambda memory, metrics: memory)
    kept = state.opt_state.memory["coef"]
    state, metrics = step(state, {}, jnp.zeros(4), jax.random.key(0))
    assert metrics["coef"].value() == 1 and kept == 1 and state.opt_state.memory["coef"] == 1


def test_remembering_changes_no_update():
    grads, params = {"w": jnp.arange(3.0)}, {"w": jnp.ones(3)}
    plain, carrying = optax.adam(0.1), remembering(optax.adam(0.1), jnp.int32(7))
    one, _ = plain.update(grads, plain.init(params), params)
    two, state = carrying.update(grads, carrying.init(params), params)
    np.testing.assert_array_equal(one["w"], two["w"])
    assert state.memory == 7


# ---- GRPO on a tiny policy: three free positions, the reward counts a token

GROUP, PROMPTS, LENGTH, WANTED = 8, 4, 3, 3


def grpo_step(token_loss, normalise, valid):
    """A bigram policy that is rewarded for token WANTED, trained with group_loss."""

    def rollout(params, prompts, key):
        table = params["policy"]["embed"] @ params["policy"]["kernel"]
        tokens, out = prompts, []
        for t in range(LENGTH):
            drawn = jax.random.categorical(jax.random.fold_in(key, t), table[tokens])
            out.append((tokens, drawn, jax.nn.log_softmax(table)[tokens, drawn]))
            tokens = drawn
        tokens, targets, logps = (jnp.stack(x, 1) for x in zip(*out, strict=True))
        ones = jnp.ones_like(tokens)
        return {"tokens": tokens, "targets": targets, "segments": ones, "mask": ones == 1, "logps": logps}

    def reward(frozen, record):
        values = np.asarray((record["targets"] == WANTED).sum(axis=1), np.float32)  # a host function
        use = np.arange(len(values)) % 8 != 5 if valid else np.ones(len(values), bool)
        return {"values": np.where(use, values, np.nan).astype(np.float32), "valid": use}

    def prepare(params, frozen, record, scores):
        advantages = policy.grpo(scores["values"], GROUP, scores["valid"])
        batch = {k: record[k] for k in ("tokens", "targets", "segments", "mask")}
        batch |= {"logps_old": record["logps"], "advantages": advantages, "weights": normalise(record["mask"])}
        return batch, policy.group_metrics(scores["values"], GROUP, scores["valid"])

    tx = optax.adam(0.05)
    loss_fn = policy.group_loss(bigram.MODEL, token_loss)
    state, _ = init_state({"policy": bigram.params(0)}, tx)
    update = jax.jit(make_train_step(loss_fn, tx, accumulate=2), donate_argnums=0)
    alone = jax.jit(rollout)
    rollout = lambda params, prompts, key: alone(params, jnp.repeat(prompts, GROUP, axis=0), key)  # noqa: E731
    return make_online_step(rollout, reward, jax.jit(prepare), update, epochs=2, minibatches=2, collect=once), state


@pytest.mark.parametrize(
    "token_loss,normalise,valid",
    [
        (partial(policy.clipped, low=0.2, high=0.28), policy.token_mean, False),
        (partial(policy.gspo, low=0.1, high=0.1), policy.sequence_mean, True),
        (partial(policy.cispo, cap=2.0), policy.constant(LENGTH), True),
    ],
    ids=["dapo", "gspo", "cispo"],
)
def test_group_methods_learn_a_toy_reward(token_loss, normalise, valid):
    step, state = grpo_step(token_loss, normalise, valid)
    rewards = []
    for _ in range(20):
        state, metrics = step(state, {}, jnp.arange(PROMPTS), jax.random.key(1))
        rewards.append(float(metrics["reward"].value()))
    assert metrics["rewards/excluded"].total == (PROMPTS * GROUP // 8 if valid else 0)
    assert abs(metrics["first/val/ratio"].value() - 1) < 1e-5
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.8, rewards
