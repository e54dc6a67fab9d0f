"""Each gate passes on a sound run and stops a run with a planted bug; then it is out of the way."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm.adapt import lora
from jaxllm.core import ops, spec
from jaxllm.core.types import TrainState, UserError
from jaxllm.generate import decode, sampling
from jaxllm.losses import preference
from jaxllm.models import decoder
from jaxllm.train import gates
from jaxllm.train.optim import warmup_cosine
from jaxllm.train.step import init_state, make_train_step
from tests.models.tiny import LLAMA, documents, fast_jit, record, weights

MODEL = lora.with_lora(decoder.make(LLAMA), rank=2, alpha=4.0, match="attention/(q|v)/kernel")
PLAIN = weights(decoder.make(LLAMA).specs)
ADAPTERS = spec.init(MODEL.specs["lora"], jax.random.key(0))
SIDES = {side: record([[d] for d in documents([7, 5], seed=i)], 8) for i, side in enumerate(("chosen", "rejected"))}
SCORE = fast_jit(partial(preference.sequence_logps, MODEL))
LOSS = preference.loss(MODEL, preference.dpo, beta=0.1)
RNG = jax.random.key(0)


def batch(reference):
    return {**SIDES, **{f"ref_{side}_logps": SCORE(reference, columns) for side, columns in SIDES.items()}}


def first_step(data, loss_fn=LOSS, lr=1e-2, tx=None, asked=None, steps=1):
    """The lines of the gates after `steps` steps of a DPO run with adapters."""
    schedule = lr if callable(lr) else lambda i: lr
    tx = tx or optax.adam(schedule)
    state, frozen = init_state({"policy": {**PLAIN, "lora": jax.tree.map(jnp.copy, ADAPTERS)}}, tx, "^policy/lora/")
    lines = []
    asked = asked or (gates.start(gates.PAIRS), gates.moved())
    step = gates.guarded(fast_jit(make_train_step(loss_fn, tx), donate_argnums=0), asked, lr=schedule, passed=lines.append)
    for _ in range(steps):
        state, _ = step(state, frozen, data, RNG)
    return lines


def test_a_sound_run_passes_and_is_then_left_alone(monkeypatch):
    data, lines = batch(PLAIN), []
    tx = optax.adam(1e-2)
    state, frozen = init_state({"policy": {**PLAIN, "lora": jax.tree.map(jnp.copy, ADAPTERS)}}, tx, "^policy/lora/")
    plain_step = fast_jit(make_train_step(LOSS, tx), donate_argnums=0)
    step = gates.guarded(plain_step, [gates.start(gates.PAIRS), gates.moved()], lr=lambda i: 1e-2, passed=lines.append)
    state, metrics = step(state, frozen, data, RNG)
    assert len(lines) == 2 and lines[0].startswith("start: rewards/chosen = ")
    # a has no gradient while b is 0
    assert lines[1].startswith("moved: 2 of 4 trained leaves, still: policy/lora/layers/attention/q/kernel/a, policy/lora/")
    assert "rewards/margins" in metrics
    monkeypatch.setattr(gates, "fetch", None)
    monkeypatch.setattr(gates, "settled", None)
    monkeypatch.setattr(jax, "device_get", None)
    state, _ = step(state, frozen, data, RNG)
    assert int(state.step) == 2 and len(lines) == 2


def test_a_wrong_reference_stops_the_run():
    other = weights(decoder.make(LLAMA).specs, seed=1)
    with pytest.raises(UserError, match=r"gate `start` failed at step 1: rewards/chosen = .*tolerance 0.001.*reference"):
        first_step(batch(other))


def test_a_start_that_is_not_a_number_or_not_there_stops_the_run():
    seen = gates.Seen(1, {"objective/kl": float("nan")}, 1.0, "float32", ({}, {}), ({}, {}))
    with pytest.raises(UserError, match=r"objective/kl = nan \(expected 0\)"):
        gates.start()(seen)
    with pytest.raises(UserError, match="none of the metrics"):
        gates.start(gates.PAIRS)(seen)
    assert gates.start()(seen._replace(step=7)) == ""  # resumed
    assert "0.04" in gates.start()(seen._replace(metrics={"first/kl": 0.04}, dtype="bfloat16"))


@pytest.mark.parametrize("how", ["the optimizer masks them", "their gradient is stopped"])
def test_frozen_adapters_stop_the_run(how):
    def stopped(params, data, rng):
        return LOSS(jax.lax.stop_gradient(params), data, rng)

    masked = optax.chain(optax.adam(1e-2), optax.set_to_zero())
    if how == "the optimizer masks them":
        with pytest.raises(UserError, match=r"gate `moved` failed at step 1: no leaf of policy was moved .* learning rate 0.01"):
            first_step(batch(PLAIN), tx=masked)
    else:
        with pytest.raises(UserError, match=r"gate `moved` failed at step 3: .*grad_norm 0"):
            decays = optax.adamw(1e-2, weight_decay=0.1)  # which moves what has no gradient
            first_step(batch(PLAIN), stopped, tx=decays, asked=[gates.moved(patience=3)], steps=3)
        assert first_step(batch(PLAIN), stopped, asked=[gates.moved(patience=None)], steps=3) == []


def test_warm_up_waits_for_a_learning_rate():
    lines = first_step(batch(PLAIN), lr=warmup_cosine(1e-2, 10, warmup=2), steps=1)
    assert len(lines) == 1 and lines[0].startswith("start")
    assert len(first_step(batch(PLAIN), lr=warmup_cosine(1e-2, 10, warmup=2), steps=2)) == 2


def test_a_changed_frozen_leaf_stops_the_run():
    """One bit of one number, written in place by a step."""
    state, frozen = init_state({"policy": {"w": jnp.ones(3)}, "reference": {"w": jnp.ones((2, 3))}}, optax.sgd(0.1), "^policy/")

    def step(state, frozen, data, rng):
        one = frozen["reference"]["w"]
        frozen["reference"]["w"] = one.at[1, 2].set(np.nextafter(np.float32(1), np.float32(2)))
        return TrainState(state.step + 1, {"policy": {"w": jnp.zeros(3)}}, state.opt_state), {}

    with pytest.raises(UserError, match=r"gate `moved` failed at step 1: 1 of 1 frozen leaves changed: reference/w\. Likely"):
        gates.guarded(step, [gates.moved()], lr=lambda i: 1.0)(state, frozen, None, RNG)


def test_every_root_must_move():
    state, _ = init_state({"policy": {"w": jnp.ones(3)}, "value": {"w": jnp.ones(3)}}, optax.sgd(0.1))

    def step(state, frozen, data, rng):
        return TrainState(state.step + 1, {**state.params, "policy": {"w": jnp.zeros(3)}}, state.opt_state), {}

    with pytest.raises(UserError, match=r"no leaf of value was moved by a gradient \(still: value/w\)"):
        gates.guarded(step, [gates.moved()], lr=lambda i: 1.0)(state, {}, None, RNG)


def test_fingerprints_see_every_change():
    """One number, one bit, a swap, in every dtype and shape; and equal trees agree, however they lie on a mesh."""
    rng = np.random.default_rng(0)
    tree = {
        "f": jnp.asarray(rng.normal(size=(3, 4, 5)), jnp.float32), "h": jnp.asarray(rng.normal(size=(6,)), jnp.bfloat16),
        "i": jnp.arange(7), "u": jnp.arange(4, dtype=jnp.uint8), "b": jnp.array([True, False]), "s": jnp.float32(1.5),
    }  # fmt: skip
    prints = jax.jit(gates.fingerprint)
    before = prints(tree)
    assert all(np.array_equal(before[n], x) for n, x in gates.fingerprint(tree).items())
    changed = {
        "f": tree["f"].at[2, 1, 3].multiply(-1), "h": tree["h"].at[5].add(0.125), "i": tree["i"].at[0].set(1),
        "u": tree["u"].at[3].set(9), "b": jnp.array([False, True]), "s": jnp.float32(1.25),
    }  # fmt: skip
    swapped = {**changed, "f": tree["f"].at[0, 0].set(tree["f"][0, 1]).at[0, 1].set(tree["f"][0, 0])}
    for other in (changed, swapped):
        after = prints(other)
        assert all(not np.array_equal(before[n], after[n]) for n in tree)
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    whole = {"f": jnp.arange(32.0).reshape(8, 4)}
    split = jax.device_put(whole, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y")))
    assert np.array_equal(prints(whole)["f"], prints(split)["f"])


@pytest.fixture(scope="module")
def sampled():
    """Samples at temperature 0.7 and top-p 0.8, as a record, and the trainer's log-probabilities for a temperature and top-p."""
    model = decoder.make(LLAMA)
    prompts, lengths = jnp.asarray(SIDES["chosen"]["tokens"][:, :4]), jnp.array([4, 3])
    draw = partial(decode.generate, model, max_new_tokens=5, temperature=0.7, top_p=0.8)
    samples = decode.to_record(fast_jit(draw)(PLAIN, prompts, lengths, RNG))

    def trainer(temperature, top_p):
        transform = None if top_p == 1 else partial(sampling.warp, top_p=top_p)
        return fast_jit(lambda p: ops.model_logps(model, p, samples, None, temperature, transform).logp)(PLAIN)

    return samples, trainer


def test_the_sampler_agrees_with_the_trainer(sampled):
    samples, trainer = sampled
    line = gates.sampler(samples["logps"], trainer(0.7, 0.8), samples["mask"])
    assert line.startswith("sampler: on 10 tokens, log-probabilities of sampler and trainer differ by ")


@pytest.mark.parametrize("temperature,top_p", [(1.0, 0.8), (0.7, 1.0)])
def test_another_temperature_or_top_p_stops_the_run(sampled, temperature, top_p):
    samples, trainer = sampled
    with pytest.raises(UserError, match=r"gate `sampler` failed: .* differ by .*temperature or top-p"):
        gates.sampler(samples["logps"], trainer(temperature, top_p), samples["mask"])


def test_the_sampler_gate_wants_tokens_and_numbers():
    with pytest.raises(UserError, match="no sampled token"):
        gates.sampler(np.zeros((1, 2)), np.zeros((1, 2)), np.zeros((1, 2), bool))
    with pytest.raises(UserError, match="differ by nan"):
        gates.sampler(np.array([[0.0, np.nan]]), np.zeros((1, 2)), np.ones((1, 2), bool))
