"""The contender: DPO steps and GRPO iterations of this library, as its experiments run them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import shape as given
from benchmarks.ours import make_model, make_params, optimizer
from benchmarks.shape import Shape
from jaxllm.core import sharding, spec
from jaxllm.core.types import Model
from jaxllm.generate import decode
from jaxllm.losses import policy, preference
from jaxllm.train.annotate import with_reference_logps
from jaxllm.train.online import make_online_step
from jaxllm.train.step import init_state, make_train_step


def record(shape: Shape, completions: np.ndarray, prompts: np.ndarray) -> dict:
    """A sequence record whose loss is on the completions."""
    whole = np.concatenate([prompts, completions], axis=1)
    mask = np.broadcast_to(np.arange(whole.shape[1] - 1) >= shape.prompt - 1, (len(whole), whole.shape[1] - 1))
    return {"tokens": whole[:, :-1], "targets": whole[:, 1:], "segments": np.ones(mask.shape, np.int32), "mask": mask}


def dpo_step(shape: Shape) -> tuple[dict, Callable[[int], None]]:
    """The train step of `experiments.dpo`; the reference's log-probabilities are columns that were made beforehand."""
    model, params, tx = make_model(shape), make_params(shape), optimizer()
    score = jax.jit(partial(preference.sequence_logps, model))
    batches = []
    for step in range(given.CHECKED_STEPS):
        prompts, chosen, rejected = given.pairs(shape, step)
        columns = {"chosen": record(shape, chosen, prompts), "rejected": record(shape, rejected, prompts)}
        batches.append(with_reference_logps(score, params, columns, shape.pairs))
    step_fn = jax.jit(make_train_step(preference.loss(model, preference.dpo, beta=given.BETA), tx), donate_argnums=0)
    state, frozen = init_state({"policy": jax.tree.map(jnp.copy, params)}, tx)
    rng, done = jax.random.key(0), 0

    def advance() -> dict:
        nonlocal state, done
        state, metrics = step_fn(state, frozen, batches[done % len(batches)], rng)
        done += 1
        return metrics

    def run(steps: int) -> None:
        for _ in range(steps):
            advance()
        jax.block_until_ready(state)

    losses = [float(advance()["loss"].value()) for _ in range(given.CHECKED_STEPS)]
    trained = 2 * shape.pairs * shape.completion
    return {"parameters": spec.count(model.specs), "losses": losses, "trained": trained}, run


def grpo_parts(shape: Shape, model: Model, mesh: Any, spent: dict[str, float]) -> tuple[Callable, ...]:
    """(rollout, reward, prepare, update) of a GRPO iteration; the seconds of rollouts and updates are added to `spent`."""

    def rows(params, prompts, lengths, key, row_offset, group=shape.group):
        # without a stop token every completion has its full length, on both sides
        options = {"max_new_tokens": shape.completion, "row_offset": row_offset, "group": group}
        return decode.generate(model, params, prompts, lengths, key, **options)

    over = decode.over_data(rows, mesh, shape.group) if mesh.size > 1 else rows

    @jax.jit
    def sample(params, prompts, lengths, key):
        s = over(params, prompts, lengths, key, 0)
        return s.tokens, decode.to_record(s)

    def rollout(params, prompts, key):
        return sample(params["policy"], prompts["tokens"], prompts["lengths"], key)

    def reward(frozen, samples):  # on the host, as a verifier is
        completions = np.asarray(samples[0])[:, shape.prompt :].tolist()
        return jnp.asarray([given.reward(row) for row in completions], jnp.float32)

    @jax.jit
    def prepare(params, frozen, samples, scores):
        batch = samples[1]
        weights = policy.sequence_mean(batch["mask"])
        columns = {"logps_old": batch["logps"], "advantages": policy.grpo(scores, shape.group), "weights": weights}
        return {k: batch[k] for k in ("tokens", "targets", "segments", "mask")} | columns, {}

    step = jax.jit(
        make_train_step(policy.group_loss(model, partial(policy.clipped, low=0.2, high=0.2)), optimizer()), donate_argnums=0
    )
    return timed(rollout, "rollout", spent), reward, prepare, timed(step, "update", spent)


def timed(fn: Callable, name: str, spent: dict[str, float]) -> Callable:
    """fn, its results waited for and its seconds added up."""

    def call(*args):
        began = time.perf_counter()
        out = jax.block_until_ready(fn(*args))
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - began
        return out

    return call


def grpo_iteration(shape: Shape) -> tuple[dict, Callable[[int], None]]:
    """An iteration of `experiments.grpo`: rollout, a reward on the host, group advantages, one update.

    As with `--config.mesh.data`, rows lie over one simulated device a core, as the other side uses every core.
    """
    devices = max(n for n in range(1, (os.cpu_count() or 1) + 1) if shape.prompts * shape.group % n == 0)
    jax.config.update("jax_num_cpu_devices", devices)
    mesh, model, spent = sharding.make_mesh({"data": devices}), make_model(shape), {}
    step = make_online_step(*grpo_parts(shape, model, mesh, spent), epochs=1, minibatches=1)
    state, frozen = init_state({"policy": make_params(shape)}, optimizer())
    lengths = np.full(shape.prompts, shape.prompt, np.int32)
    prompts = {"tokens": given.prompts(shape)[: shape.prompts], "lengths": lengths}
    state, prompts, rng = sharding.replicate((state, prompts, jax.random.key(0)), mesh)

    def run(times: int) -> None:
        nonlocal state
        with sharding.use(mesh):
            for _ in range(times):
                state, metrics = step(state, frozen, prompts, rng)
                jax.block_until_ready((state, metrics))

    run(2)  # compiles
    outside = []
    for _ in range(7):
        spent.clear()
        began = time.perf_counter()
        run(1)
        outside.append(1 - sum(spent.values()) / (time.perf_counter() - began))
    completions = shape.prompts * shape.group
    return {
        "parameters": spec.count(model.specs), "completions": completions, "trained": completions * shape.completion,
        "outside": outside,
    }, run  # fmt: skip
