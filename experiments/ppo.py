"""PPO from a fine-tuned model against a reward model, with a per-token KL penalty to where it started.

    python -m experiments.ppo --config.init=runs/sft --config.reward_model=runs/reward
    python -m experiments.ppo --config.kl_target=6                # the KL's coefficient follows a KL of 6 nats an answer
    python -m experiments.ppo --config.ptx_coef=1                 # PPO-ptx: pretraining text beside the rollouts
    python -m experiments.ppo --config.loss=dual_clip

policy and value are trained; reference and reward are frozen. The value starts from the reward model (arXiv 2203.02155).
Rewards are standardised on the starting policy's own samples, so that kl_coef means the same for every reward model.

At the first iteration the ratio is 1 and the KL 0. In the quickstart, seeds 0, 1, 2, the gold reward rose by .52, .38, .51 at a
KL of .8 nats an answer (docs/quickstart.md).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments import common, completions, memory, pretrain
from jaxllm import launch
from jaxllm.core import tree
from jaxllm.core.ops import model_logps
from jaxllm.core.types import Mean, UserError, mean_of
from jaxllm.data import chat, pack
from jaxllm.data.text import placed
from jaxllm.losses import policy, reward
from jaxllm.models import heads
from jaxllm.train import gates, processes
from jaxllm.train.annotate import map_batches
from jaxllm.train.online import make_online_step, masked_sum, remembering
from jaxllm.worlds import instr

LOSSES = {
    "ppo": lambda c: partial(policy.ppo_policy, clip=c.clip),
    "dual_clip": lambda c: partial(policy.dual_clip, clip=c.clip, dual=c.dual),
}


def check(config):
    """UserErrors about the settings, before anything is trained."""
    if config.loss not in LOSSES:
        raise UserError(f"config.loss={config.loss!r}: choose one of {', '.join(LOSSES)}")
    if config.loss == "dual_clip" and config.dual <= 1 + config.clip:
        raise UserError(f"config.dual={config.dual} must be above 1 + config.clip = {1 + config.clip:g}: 3 is usual")
    if config.kl_target < 0 or (config.kl_target and config.kl_coef <= 0):
        raise UserError(
            f"config.kl_target={config.kl_target} with kl_coef={config.kl_coef}: give a number of nats, 0 or more, and a "
            "coefficient above 0 to start from"
        )
    if config.max_new_tokens < 1:
        raise UserError(f"config.max_new_tokens={config.max_new_tokens}: it must be 1 or more")
    if config.batch_size % config.minibatches:
        raise UserError(f"config.minibatches={config.minibatches} does not divide config.batch_size={config.batch_size}")


def prompt_of(row, where):
    """The prompt of a row, text or messages."""
    if row.get("prompt") is None:
        raise UserError(f"{where}: PPO needs a `prompt` column, the row has {', '.join(row)}")
    chat.as_messages(row["prompt"], "user", f"{where}, prompt")
    return row["prompt"]


def prompts_of(config, run):
    """(prompts, where each stands): rows with `prompt`, or tasks of the instr world."""
    own = lambda: instr.tasks("train", config.data.rows, seed=config.seed + 7)  # noqa: E731
    rows, _ = common.rows_of(config, run, placed(prompt_of), own)
    return [prompt for _, prompt in rows], [place for place, _ in rows]


def pretraining_text(config, run, tokenizer, rows):
    """Packed pretraining text as `rows` rows, drawn again where there is less: columns that travel beside the prompts."""
    where = config.data.ptx
    documents = pretrain.documents_of(config, run, where) if where else pretrain.embedded(400_000, 0.65, config.seed)
    length = config.max_prompt + config.max_new_tokens
    examples = [e for d in documents for e in pack.split_long(chat.encode_document(tokenizer, d), length)]
    columns, report = pack.pack(examples, length)
    pack.check_report(report, where or "pretraining text", tokenizer)
    common.print_report(run, "pretraining text", report)
    return common.take(columns, np.random.default_rng(config.seed).integers(0, report["rows"], rows))


def make_prepare(config, model, scalars, whole):
    """prepare(params, frozen, samples, scores): the update's batch, and TRL's metrics of the rollout."""

    @jax.jit
    def prepare(params, frozen, samples, scores):
        coef = frozen["memory"].coef
        _, record, ptx = samples
        mask, logps = record["mask"], record["logps"]
        reference = model_logps(model, frozen["reference"], record, temperature=config.temperature)
        kl = jnp.where(mask, logps - reference.logp, 0.0)
        values = scalars(params["value"], record)
        rewards = policy.kl_penalised_rewards(scores, logps, reference.logp, mask, kl_coef=coef)
        advantages, returns = policy.gae(rewards, values, mask, gamma=config.gamma, lam=config.lam)
        batch = {k: record[k] for k in ("tokens", "targets", "segments", "mask")}
        batch |= {"logps_old": logps, "values_old": values, "returns": returns, "advantages": policy.whiten(advantages, mask)}
        if ptx:
            batch["ptx"] = {**ptx, "weights": policy.spread(ptx["mask"], mask.sum())}
        stopped = samples[0].stopped
        return batch, {
            "objective/kl": mean_of(kl.sum(axis=1)),
            "objective/entropy": mean_of(masked_sum(-logps, mask)),
            "objective/non_score_reward": mean_of(-coef * kl.sum(axis=1)),
            "objective/kl_coef": Mean(coef, jnp.float32(1)),
            "objective/scores": mean_of(scores),
            "objective/rlhf_reward": mean_of(rewards.sum(axis=1)),
            "val/num_eos_tokens": mean_of(stopped),
            "completions/mean_length": mean_of(mask.sum(axis=1)),
        }

    return lambda params, *rest: prepare(whole(params), *rest)


def step_of(config, own, loss_fn, scalars, sample, prompts, params, frozen):
    """What an update trains, and on which shapes: those of a rollout, which nothing is drawn for."""
    first = common.take(prompts, slice(0, config.batch_size))
    given = {k: first[k] for k in ("tokens", "lengths")}
    samples = *jax.eval_shape(sample, frozen["reference"], given, jax.random.key(0), 0), first.get("ptx", {})
    known = {**frozen, "memory": policy.AdaptiveKL(jnp.float32(config.kl_coef))}
    scores = jax.ShapeDtypeStruct((config.batch_size,), "float32")
    columns, _ = jax.eval_shape(make_prepare(config, own.model, scalars, lambda p: p), params, known, samples, scores)
    return memory.Step(own.model, "policy", f"{own.trainable}|^value/", loss_fn, columns, None, params, frozen, rows_of)


def rows_of(config):
    """Rows of an update; UserError where the settings do not fit together."""
    check(config)
    return config.batch_size // config.minibatches


def make_reward(config, scalars):
    """reward(frozen, samples) -> scores [b], standardised, less missing_eos_penalty where no end token was drawn."""

    @jax.jit
    def score(frozen, samples):
        s, record, _ = samples
        raw = reward.score(scalars, frozen["reward"], record)
        scaled = (raw - frozen["scale"]["mean"]) / frozen["scale"]["std"]
        return scaled - config.missing_eos_penalty * (1.0 - s.stopped)

    return score


def reward_scale(config, sample, params, scalars, reward_params, prompts):
    """Mean and standard deviation of the raw reward over samples of the starting policy: about 512, whole batches."""
    batches = min(512, len(prompts["lengths"])) // config.batch_size
    first = common.take(prompts, slice(0, max(1, batches) * config.batch_size))
    _, record = sample(params, first, jax.random.key(config.seed + 1), 0)
    raw = map_batches(jax.jit(partial(reward.score, scalars)), reward_params, processes.on_host(record), config.batch_size)
    return {"mean": jnp.float32(raw.mean()), "std": jnp.float32(max(raw.std(), 1e-6))}


def check_first(config, run, model, sample, params, prompts):
    """The gate on the sampler, on the first rollout's prompts."""
    first = common.take({k: prompts[k] for k in ("tokens", "lengths")}, slice(0, config.batch_size))
    record = sample(params, first, jax.random.key(config.seed), 0)[1]
    common.check_sampler(config, run, model, params, record, temperature=config.temperature)


def objective(config, model, scalars):
    """The LossFn of an update."""
    loss_fn = policy.loss(
        model, scalars, clip=config.clip, value_clip=config.value_clip, value_coef=config.value_coef,
        token_loss=LOSSES[config.loss](config), temperature=config.temperature,
    )  # fmt: skip
    return policy.with_ptx(loss_fn, model, ptx_coef=config.ptx_coef) if config.ptx_coef else loss_fn


def make_step(config, model, scalars, sample, policy_of, update, whole):
    """The online step: rollouts with the policy's merged weights, updates of `model`."""

    def rollout(params, prompts, key):
        given = {k: prompts[k] for k in ("tokens", "lengths")}
        return *sample(policy_of(params), given, key, 0), prompts.get("ptx", {})

    def follow(controller, metrics):
        return policy.adapt(controller, metrics["objective/kl"].value(), target=config.kl_target)

    return make_online_step(
        rollout, make_reward(config, scalars), make_prepare(config, model, scalars, whole), update,
        epochs=config.epochs, minibatches=config.minibatches,
        observe=follow if config.kl_target else lambda controller, metrics: controller,
    )  # fmt: skip


def main(config, run):
    check(config)
    texts, places = prompts_of(config, run)
    common.check_batch(config, len(texts))
    start = common.need("sft", config.init, config, run)
    reward_run = common.need("reward", config.reward_model, config, run, init=start)
    with common.open_mesh(config) as mesh:
        base = launch.load(start, default="sft", mesh=mesh)
        judge = launch.load(reward_run, "reward", mesh=mesh)
        common.same_tokenizer(base, judge)
        common.check_length(base.model, config.max_prompt + config.max_new_tokens, "config.max_prompt + config.max_new_tokens")
        prompts = completions.prompt_columns(base.tokenizer, texts, config.max_prompt, places)
        scalars = partial(heads.scalars, heads.with_scalar_head(base.model))
        sample = completions.sampler(
            base.model, base.tokenizer, max_new_tokens=config.max_new_tokens, temperature=config.temperature, mesh=mesh
        )
        start_policy, judge_params = base.params["policy"], judge.params["reward"]
        check_first(config, run, base.model, sample, start_policy, prompts)
        scale = reward_scale(config, sample, start_policy, scalars, judge_params, prompts)
        if config.ptx_coef:
            prompts["ptx"] = pretraining_text(config, run, base.tokenizer, len(texts))
        own = common.adapted(config, base.model, start_policy, mesh)
        tx, _ = common.optimizer(config, config.steps * config.epochs * config.minibatches)
        tx = remembering(tx, policy.AdaptiveKL(jnp.float32(config.kl_coef)))
        # a copy: the update donates its parameters, and the judge's are also frozen
        value = jax.tree.map(jnp.copy, judge_params)
        loss_fn, params = objective(config, own.model, scalars), {"policy": own.params, "value": value}
        judges = {"reference": own.reference, "reward": judge_params, "scale": scale}
        step = step_of(config, own, loss_fn, scalars, sample, prompts, params, judges)
        state, kept, update = memory.begin(config, step, loss_fn, tx, mesh)
        whole = lambda params: tree.merge(params, kept)  # noqa: E731
        policy_of = lambda params: own.merge(whole(params)["policy"])  # noqa: E731
        final: dict[str, float] = {}
        _, schedule = common.optimizer(config)
        common.fit(
            config, run, mesh=mesh, columns=prompts, tokenizer=base.tokenizer, model=base.model, state=state,
            frozen=kept | judges, schedule=schedule,
            step_fn=make_step(config, own.model, scalars, sample, policy_of, update, whole),
            tokens_per_step=config.batch_size * config.max_new_tokens, last=final, turns=base.meta.get("turns", 1),
            checks=(gates.start(), gates.moved()),
        )  # fmt: skip
    run.finish(final, [], then=f"chat --run={run.workdir}")


if __name__ == "__main__":
    launch.run(main, "ppo")
