"""GRPO and its siblings from a fine-tuned model, against rewards that are functions: a verifier, a user's own, or several.

    python -m experiments.grpo --config.init=runs/sft                                          # the instr world
    python -m experiments.grpo --config.data.path=gsm8k.jsonl --config.steps=20
    python -m experiments.grpo --config=configs/grpo.py:dapo --config.init=runs/sft

In the instr world, with the default config, from a quickstart's sft of seed 0: reward .27 at first, .82 on held-out
prompts after 100 steps.

An algorithm is an advantage, a token loss, a normalisation and a KL, each by name in the tables below. Rewards that fail are
left out, counted (rewards/excluded) and named; they are no rewards of 0.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import common, completions, memory, verifiable
from jaxllm import launch
from jaxllm.core.ops import model_logps
from jaxllm.core.types import Mean, UserError, mean_of
from jaxllm.generate.decode import repeat_rows
from jaxllm.generate.rewards import combine
from jaxllm.generate.sampling import warp
from jaxllm.losses import policy
from jaxllm.losses.policy.kl import check_loss
from jaxllm.train import gates, processes
from jaxllm.train.online import make_online_step, masked_sum, until_informative
from jaxllm.train.step import settled, trained_roots

# (config, rollout) -> [b] or [b, l]
ADVANTAGES = {
    "grpo": lambda c, r: policy.grpo(r.scores, c.group, r.valid),
    "dr_grpo": lambda c, r: policy.dr_grpo(r.scores, c.group, r.valid),
    "rloo": lambda c, r: policy.rloo(r.scores, c.group, r.valid),
    "remax": lambda c, r: policy.remax(r.scores, r.greedy, r.valid),
    "batch_mean": lambda c, r: policy.baseline(r.scores, mean_of(r.scores, r.valid).value(), r.valid),
    "reinforce_pp": lambda c, r: policy.reinforce_pp(
        r.scores, r.logps, r.ref_logps, r.mask, r.valid, kl_coef=c.kl_coef if c.kl == "reward" else 0.0
    ),
}
LOSSES = {
    "clipped": lambda low, high: partial(policy.clipped, low=low, high=high),
    "gspo": lambda low, high: partial(policy.gspo, low=low, high=high),
    "cispo": lambda low, high: partial(policy.cispo, cap=1.0 + high),
    "dual_clip": lambda low, high: partial(policy.dual_clip, clip=low, dual=high),
    "reinforce": lambda low, high: policy.reinforce,
}
NORMALISE = {
    "sequence_mean": lambda longest: policy.sequence_mean, "token_mean": lambda longest: policy.token_mean,
    "constant": policy.constant,
}  # fmt: skip
KL = {"none": None, "k1": policy.k1, "k2": policy.k2, "k3": policy.k3, "reward": None}
OVERLONG = ("keep", "mask", "shape")
EVALUATED = 128  # held-out problems at most


class Rollout(NamedTuple):
    """What advantages are made of: scores, greedy, valid [b]; logps, ref_logps, mask [b, l]."""

    scores: Any
    greedy: Any
    valid: Any
    logps: Any
    ref_logps: Any
    mask: Any


def check(config):
    """UserErrors about the settings, before anything is trained."""
    tables = {"advantage": ADVANTAGES, "loss": LOSSES, "normalise": NORMALISE, "kl": KL, "overlong": OVERLONG}
    for name, table in tables.items():
        if config[name] not in table:
            raise UserError(f"config.{name}={config[name]!r}: choose one of {', '.join(table)}")
    check_loss(KL[config.kl])
    trained = (config.groups or config.batch_size) * config.group
    if config.group < 2 and config.advantage in ("grpo", "dr_grpo", "rloo"):
        raise UserError(f"config.group={config.group}: {config.advantage} compares completions of one prompt, use 2 or more")
    if trained % (config.minibatches * config.accumulate):
        raise UserError(
            f"config.minibatches={config.minibatches} x accumulate={config.accumulate} do not divide the {trained} completions"
        )
    if config.groups and (config.groups > config.batch_size or config.batch_size % config.groups):
        raise UserError(f"config.groups={config.groups} must divide config.batch_size={config.batch_size}, the prompts of a step")
    if len(config.clip) != 2:
        raise UserError(f"config.clip={config.clip}: give two numbers, below and above 1")
    if config.temperature <= 0:
        raise UserError(f"config.temperature={config.temperature}: completions of a group must differ, use a temperature above 0")
    if config.slots < 0:
        raise UserError(f"config.slots={config.slots}: give the rows to decode at once, or 0 for all of a rollout")
    if config.top_p < 1 and config.kl != "none":
        raise UserError(f"config.top_p={config.top_p}: the reference may give what is drawn probability 0, use config.kl=none")
    if config.loss == "reinforce" and (config.epochs, config.minibatches) != (1, 1):
        raise UserError("config.loss=reinforce has no ratio: it needs config.epochs=1 and config.minibatches=1")


def nucleus(top_p):
    """The trainer's counterpart of sampling with top_p, or None; a token that left the nucleus since has e^-40 of the largest."""

    def transform(logits):
        kept = warp(logits, top_p=top_p)
        return jnp.where(kept == -jnp.inf, kept.max(axis=-1, keepdims=True) - 40.0, kept)

    return transform if top_p < 1 else None


def make_rollout(config, sample, greedy, policy_of):
    """rollout(params, prompts, key) -> {samples, record, row} and, where a greedy sampler is given, greedy: its samples."""

    again = jax.jit(partial(repeat_rows, group=config.group))

    def rollout(params, prompts, key):
        own, given = policy_of(params), {k: prompts[k] for k in ("tokens", "lengths")}
        samples, record = sample(own, given, key, 0)
        columns = {"row": prompts["row"]} if greedy is None else {"row": prompts["row"], "greedy": greedy(own, given, key, 0)[0]}
        return {"samples": samples, "record": record} | settled(again(columns))

    return rollout


def make_reward(run, score):
    """(reward(frozen, samples) -> {values, valid, greedy [b]}, take()): take gives metrics of all that was scored since."""
    seen: list[combine.Scores] = []

    def reward(frozen, samples):
        rows = processes.on_host(samples["row"])
        scores = score(samples["samples"], rows)
        seen.append(scores)
        for line in combine.describe(scores):
            run.warn(line, once=line.split(" failed")[0])
        values = {"values": scores.values, "valid": scores.valid, "greedy": np.zeros(len(rows), np.float32)}
        if "greedy" in samples:
            greedy = score(samples["greedy"], rows)
            for line in combine.describe(greedy):
                run.warn(f"greedy answers: {line}", once=f"greedy answers: {line.split(' failed')[0]}")
            values |= {"greedy": greedy.values, "valid": scores.valid & greedy.valid}
        # what is excluded is named by `valid`; its value is never read
        return {name: jnp.asarray(np.where(values["valid"], x, 0).astype(x.dtype)) for name, x in values.items()}

    def take():
        joined = combine.joined(seen)
        seen.clear()
        return {name: Mean(np.float32(total), np.float32(count)) for name, (total, count) in combine.metrics(joined).items()}

    return reward, take


def make_prepare(config, model, longest, transform, whole, take):
    """prepare(params, frozen, samples, scores): the update's batch, and TRL's metrics of the rollout."""
    logps_of = partial(model_logps, model, temperature=config.temperature, transform=transform)
    normalise = NORMALISE[config.normalise](longest)

    def shaped(scores, samples, lengths):
        if config.overlong != "shape":
            return scores
        return scores + policy.overlong_shaping(lengths, longest, max(1, longest // 4))

    @jax.jit
    def inner(params, frozen, samples, record, rewards):
        sampled, logps, valid = record["mask"], record["logps"], rewards["valid"]
        mask = sampled & valid[:, None]
        if config.overlong == "mask":
            mask = policy.without_truncated(mask, samples.stopped)
        batch = {k: record[k] for k in ("tokens", "targets", "segments")} | {"mask": mask, "logps_old": logps}
        lengths = sampled.sum(axis=1)
        scores = shaped(rewards["values"], samples, lengths)
        metrics = policy.group_metrics(scores, config.group, valid) | length_metrics(lengths, samples.stopped)
        ref = jnp.zeros_like(logps)
        if config.kl != "none":
            ref = logps_of(frozen["reference"], record).logp
            kl = masked_sum(logps - ref, sampled)
            metrics["objective/kl"] = mean_of(kl)
            if config.kl != "reward":
                batch["ref_logps"] = ref
            elif config.advantage != "reinforce_pp":
                scores = scores - config.kl_coef * kl
        if config.importance_cap > 0:
            batch["logps_old"] = logps_of(params["policy"], record).logp
            batch["importance"] = policy.truncated_importance(batch["logps_old"], logps, config.importance_cap)
        rollout = Rollout(scores, rewards["greedy"], valid, logps, ref, mask)
        batch |= {"advantages": ADVANTAGES[config.advantage](config, rollout), "weights": normalise(mask)}
        return batch, metrics

    def prepare(params, frozen, samples, rewards):
        batch, metrics = inner(whole(params), frozen, samples["samples"], samples["record"], rewards)
        return batch, metrics | take()  # failures are counted over all that was drawn, not only over what trains

    return prepare


def step_of(config, own, loss_fn, sample, prompts, longest):
    """What an update trains, and on which shapes: those of a rollout, which nothing is drawn for."""
    first = common.take({k: prompts[k] for k in ("tokens", "lengths")}, slice(0, config.groups or config.batch_size))
    samples, record = jax.eval_shape(sample, own.reference, first, jax.random.key(0), 0)
    n = len(first["lengths"]) * config.group
    rewards = {k: jax.ShapeDtypeStruct((n,), t) for k, t in (("values", "float32"), ("valid", bool), ("greedy", "float32"))}
    params, frozen = {"policy": own.params}, {"reference": own.reference}
    prepare = make_prepare(config, own.model, longest, nucleus(config.top_p), lambda p: p, dict)
    columns, _ = jax.eval_shape(prepare, params, frozen, {"samples": samples, "record": record}, rewards)
    return memory.Step(own.model, "policy", own.trainable, loss_fn, columns, None, params, frozen, rows_of)


def rows_of(config):
    """Rows of an update; UserError where the settings do not fit together."""
    check(config)
    return (config.groups or config.batch_size) * config.group // config.minibatches


def check_first(config, run, base, sample, prompts):
    """The gate on the sampler, on the first prompts as a rollout has them."""
    first = common.take({k: prompts[k] for k in ("tokens", "lengths")}, np.arange(config.batch_size))
    record = sample(base.params["policy"], first, jax.random.key(config.seed), 0)[1]
    common.check_sampler(
        config, run, base.model, base.params["policy"], record, temperature=config.temperature, transform=nucleus(config.top_p)
    )


def on_policy(seen):
    """The gate of the first step; where nothing was left to train (all excluded, or all cut off) it has nothing to say."""
    expected = gates.ONLINE | {"sampling/importance_sampling_ratio/mean": 1.0}
    return "" if seen.metrics.get("completions/empty") == 1 else gates.start(expected)(seen)


def length_metrics(lengths, stopped):
    """TRL's completions/..., in sampled tokens with the end token."""
    one = lambda x: mean_of(jnp.asarray(x, jnp.float32).reshape(1))  # noqa: E731
    return {
        "completions/mean_length": mean_of(lengths), "completions/min_length": one(lengths.min()),
        "completions/max_length": one(lengths.max()), "completions/clipped_ratio": mean_of(~stopped),
        "completions/mean_terminated_length": mean_of(lengths, stopped),
    }  # fmt: skip


def make_evaluate(run, sample, tasks, prompts, tokenizer, score, merge, final):
    """evaluate(step, params): the greedy reward on held-out problems."""

    def evaluate(step, params):
        n = len(tasks.rows)
        done = completions.complete(sample, merge(params["policy"]), tokenizer, prompts, jax.random.key(0), min(64, n))
        scores = score(tasks.rows, done.texts, done.ended, done.lengths)
        values = {"eval/reward": float(scores.values[scores.valid].mean()) if scores.valid.any() else 0.0}
        values |= {f"eval/{name}": total / max(count, 1) for name, (total, count) in combine.metrics(scores).items()}
        values |= {"eval/mean_length": float(done.lengths.mean()), "eval/clipped_ratio": float((~done.ended).mean())}
        final.update(values)
        run.log(step, values)
        for i in range(min(3, n)):
            row, value = tasks.rows[i], float(scores.values[i])
            run.sample(step, row["prompt"], done.texts[i], gold=row["gold"], reward=value if scores.valid[i] else None)

    return evaluate


def objective(config, model):
    """The LossFn of an update."""
    return policy.group_loss(
        model, LOSSES[config.loss](*config.clip), kl=KL[config.kl], kl_coef=config.kl_coef, temperature=config.temperature,
        transform=nucleus(config.top_p),
    )  # fmt: skip


def make_step(config, own, update, functions, longest):
    """The online step of the config's algorithm; functions: (sample, greedy, score, run, policy_of, whole)."""
    sample, greedy, score, run, policy_of, whole = functions
    reward, take = make_reward(run, score)
    informative = jax.jit(lambda r: policy.keep_informative(r["values"], config.group, r["valid"]))
    parts = config.batch_size // (config.groups or config.batch_size)
    collect = partial(until_informative, informative=informative, parts=parts) if config.groups else None
    return make_online_step(
        make_rollout(config, sample, greedy if config.advantage == "remax" else None, policy_of), reward,
        make_prepare(config, own.model, longest, nucleus(config.top_p), whole, take), update,
        epochs=config.epochs, minibatches=config.minibatches, collect=collect,
    )  # fmt: skip


def main(config, run):
    check(config)
    train, held_out = verifiable.split_tasks(config, run, min(8192, config.batch_size * config.steps), EVALUATED)
    functions, weights = verifiable.parse_rewards(config.rewards, train)
    score = partial(verifiable.score_texts, functions, weights)
    common.check_batch(config, len(train.prompts))
    start = verifiable.start_of(config, run, train)
    with common.open_mesh(config) as mesh:
        base = launch.load(start, default="sft", mesh=mesh)
        new = verifiable.completion_tokens(config, base.tokenizer, train)
        train, prompts = verifiable.prompt_columns(config, run, base, train, new)
        held_out, eval_prompts = verifiable.prompt_columns(config, run, base, held_out, new)
        common.check_batch(config, len(train.rows))
        run.note(f"completions of up to {new} tokens, reward: {' + '.join(f'{weights[n]:g} {n}' for n in functions)}")
        prompts["row"] = np.arange(len(train.rows), dtype=np.int32)
        draw = partial(completions.sampler, base.model, base.tokenizer, max_new_tokens=new)
        greedy = draw(temperature=0.0)
        own = common.adapted(config, base.model, base.params["policy"], mesh)
        tx, _ = common.optimizer(config, config.steps * config.epochs * config.minibatches)
        options = {"temperature": config.temperature, "top_p": config.top_p}
        sample = draw(mesh=mesh, group=config.group, slots=config.slots, **options)
        loss_fn = objective(config, own.model)
        step = step_of(config, own, loss_fn, sample, prompts, new)
        state, frozen, update = memory.begin(config, step, loss_fn, tx, mesh)
        whole = partial(trained_roots, frozen=frozen)
        policy_of = lambda params: own.merge(whole(params)["policy"])  # noqa: E731

        def score_rows(samples, rows):
            return score([train.rows[i] for i in rows], *verifiable.decode(base.tokenizer, samples))

        check_first(config, run, base, sample, prompts)
        step_fn = make_step(config, own, update, (sample, greedy, score_rows, run, policy_of, whole), new)
        final: dict[str, float] = {}
        evaluate = make_evaluate(run, greedy, held_out, eval_prompts, base.tokenizer, score, own.merge, final)
        common.fit(
            config, run, mesh=mesh, columns=prompts, tokenizer=base.tokenizer, model=base.model, state=state,
            frozen=frozen | {"reference": own.reference}, step_fn=step_fn, schedule=common.optimizer(config)[1],
            evaluate=evaluate, tokens_per_step=(config.groups or config.batch_size) * config.group * new, last=final,
            turns=base.meta.get("turns", 1), checks=(on_policy, gates.moved(None)),
        )  # fmt: skip
    run.finish(final, [], then=f"chat --run={run.workdir}")


if __name__ == "__main__":
    launch.run(main, "grpo")
