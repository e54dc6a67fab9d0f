"""PPO from a fine-tuned model against a reward model, with a per-token KL penalty to where it started.

    python -m experiments.ppo --config.init=runs/sft --config.reward_model=runs/reward

policy and value are trained; reference and reward are frozen. The value starts from the reward model (arXiv 2203.02155).
Rewards are standardised on the starting policy's own samples, so that kl_coef means the same for every reward model.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from experiments import common, completions
from jaxllm import launch
from jaxllm.core.ops import model_logps
from jaxllm.core.types import UserError, mean_of
from jaxllm.losses import policy, reward
from jaxllm.models import heads
from jaxllm.train.annotate import map_batches
from jaxllm.train.online import make_online_step, masked_sum
from jaxllm.worlds import instr


def prompts_of(config):
    """(prompts, where they come from): rows with `prompt`, or tasks of the instr world."""
    rows, where = common.rows_of(config, lambda: instr.tasks("train", config.data.rows, seed=config.seed + 7))
    for i, row in enumerate(rows):
        if "prompt" not in row:
            raise UserError(f"{where} row {i + 1}: PPO needs a `prompt` column, the row has {', '.join(row)}")
    return [r["prompt"] for r in rows], where


def make_prepare(config, model, scalars):
    """prepare(params, frozen, samples, scores): the update's batch, and TRL's metrics of the rollout."""

    def prepare(params, frozen, samples, scores):
        _, record = samples
        mask, logps = record["mask"], record["logps"]
        reference = model_logps(model, frozen["reference"], record, temperature=config.temperature)
        kl = jnp.where(mask, logps - reference.logp, 0.0)
        values = scalars(params["value"], record)
        rewards = policy.kl_penalised_rewards(scores, logps, reference.logp, mask, kl_coef=config.kl_coef)
        advantages, returns = policy.gae(rewards, values, mask, gamma=config.gamma, lam=config.lam)
        batch = {k: record[k] for k in ("tokens", "targets", "segments", "mask")}
        batch |= {"logps_old": logps, "values_old": values, "returns": returns, "advantages": policy.whiten(advantages, mask)}
        stopped = samples[0].stopped
        return batch, {
            "objective/kl": mean_of(kl.sum(axis=1)),
            "objective/entropy": mean_of(masked_sum(-logps, mask)),
            "objective/non_score_reward": mean_of(-config.kl_coef * kl.sum(axis=1)),
            "objective/scores": mean_of(scores),
            "objective/rlhf_reward": mean_of(rewards.sum(axis=1)),
            "val/num_eos_tokens": mean_of(stopped),
            "completions/mean_length": mean_of(mask.sum(axis=1)),
        }

    return jax.jit(prepare)


def make_reward(config, scalars):
    """reward(frozen, samples) -> scores [b], standardised, less missing_eos_penalty where no end token was drawn."""

    @jax.jit
    def score(frozen, samples):
        s, record = samples
        raw = reward.score(scalars, frozen["reward"], record)
        scaled = (raw - frozen["scale"]["mean"]) / frozen["scale"]["std"]
        return scaled - config.missing_eos_penalty * (1.0 - s.stopped)

    return score


def reward_scale(config, sample, params, scalars, reward_params, prompts):
    """Mean and standard deviation of the raw reward over samples of the starting policy: about 512, whole batches."""
    batches = min(512, len(prompts["lengths"])) // config.batch_size
    first = common.take(prompts, slice(0, max(1, batches) * config.batch_size))
    _, record = sample(params, first, jax.random.key(config.seed + 1), 0)
    raw = map_batches(jax.jit(partial(reward.score, scalars)), reward_params, jax.device_get(record), config.batch_size)
    return {"mean": jnp.float32(raw.mean()), "std": jnp.float32(max(raw.std(), 1e-6))}


def main(config, run):
    texts, where = prompts_of(config)
    common.check_batch(config, len(texts))
    if config.batch_size % config.minibatches:
        raise UserError(f"config.minibatches={config.minibatches} does not divide config.batch_size={config.batch_size}")
    start = common.need("sft", config.init, config, run)
    reward_run = common.need("reward", config.reward_model, config, run, init=start)
    with common.open_mesh(config) as mesh:
        base = launch.load(start, default="sft", mesh=mesh)
        judge = launch.load(reward_run, "reward", mesh=mesh)
        common.same_tokenizer(base, judge)
        common.check_length(base.model, config.max_prompt + config.max_new_tokens, "config.max_prompt + config.max_new_tokens")
        prompts = completions.prompt_columns(base.tokenizer, texts, config.max_prompt, where)
        scalars = partial(heads.scalars, heads.with_scalar_head(base.model))
        sample = completions.sampler(
            base.model, base.tokenizer, max_new_tokens=config.max_new_tokens, temperature=config.temperature, mesh=mesh
        )
        start_policy, judge_params = base.params["policy"], judge.params["reward"]
        scale = reward_scale(config, sample, start_policy, scalars, judge_params, prompts)
        frozen = {"reference": start_policy, "reward": judge_params, "scale": scale}
        updates = config.steps * config.epochs * config.minibatches
        tx, _ = common.optimizer(config, updates)
        # copies: the update donates its parameters, and these buffers are also the frozen ones
        own = jax.tree.map(jnp.copy, {"policy": start_policy, "value": judge_params})
        state, _ = common.new_state(own, tx, mesh)
        loss_fn = policy.loss(
            base.model, scalars, clip=config.clip, value_clip=config.value_clip, value_coef=config.value_coef,
            temperature=config.temperature,
        )  # fmt: skip
        step_fn = make_online_step(
            lambda params, batch, key: sample(params["policy"], batch, key, 0), make_reward(config, scalars),
            make_prepare(config, base.model, scalars), common.jit_step(loss_fn, tx, state, config.accumulate),
            epochs=config.epochs, minibatches=config.minibatches,
        )  # fmt: skip
        final: dict[str, float] = {}
        _, schedule = common.optimizer(config)
        common.fit(
            config, run, mesh=mesh, columns=prompts, tokenizer=base.tokenizer, model=base.model, state=state, frozen=frozen,
            step_fn=step_fn, schedule=schedule, tokens_per_step=config.batch_size * config.max_new_tokens, last=final,
            turns=base.meta.get("turns", 1),
        )  # fmt: skip
    run.finish(final, [], then=f"chat --run={run.workdir}")


if __name__ == "__main__":
    launch.run(main, "ppo")
