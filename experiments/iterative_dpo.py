"""Iterative DPO: rounds of fresh pairs from the latest policy, each round's reference being the policy it starts from.

    python -m experiments.iterative_dpo --config.init=runs/sft
    python -m experiments.iterative_dpo --config.init=runs/sft --config.judge=reward_model --config.reward_model=runs/reward

Pairs that an older policy drew say little about the present one (arXiv 2407.21783; `experiments.studies.iterative_dpo` measures
it). The model of round i is the run <workdir>/round<i>, its pairs are <workdir>/data/round<i>.jsonl.

In the instr world, seed 0, from a quickstart's sft: gold on held-out prompts .29 at the start, .60, .55, .66 after rounds 1 to 3.
"""

from __future__ import annotations

from functools import partial

import jax
import numpy as np

from experiments import common, feedback, verifiable
from jaxllm import launch
from jaxllm.core.types import UserError
from jaxllm.losses import reward
from jaxllm.models import heads
from jaxllm.train import rounds
from jaxllm.train.annotate import map_batches
from jaxllm.worlds.instr_score import SHARPNESS


def annotator(config, run, base, tasks):
    """The simulated annotator of the instr world: Bradley-Terry on its gold reward, which for k texts is Gumbel noise on each."""
    if config.data.path:
        raise UserError(f"config.judge=annotator knows the instr world alone: for {config.data.path} use rewards or reward_model")

    def score(drawn, index):
        gold = feedback.gold_scores(tasks, drawn.done, config.samples)
        return SHARPNESS * gold + np.random.default_rng([config.seed, 1, index]).gumbel(size=gold.shape)

    return score


def verifier(config, run, base, tasks):
    """config.rewards, or the verifier of the tasks."""
    functions, weights = verifiable.parse_rewards(config.rewards, tasks)
    rows = [row for row in tasks.rows for _ in range(config.samples)]

    def score(drawn, index):
        done = drawn.done
        scores = verifiable.score_texts(functions, weights, rows, done.texts, done.ended, done.lengths)
        return feedback.describe(scores, run).reshape(len(tasks.rows), -1)

    return score


def reward_model(config, run, base, tasks):
    """The reward model of a run."""
    judge = launch.load(common.need("reward", config.reward_model, config, run, init=base.workdir), "reward")
    common.same_tokenizer(base, judge)
    scalars = partial(heads.scalars, heads.with_scalar_head(base.model))
    scored = jax.jit(partial(reward.score, scalars))

    def score(drawn, index):
        return map_batches(scored, judge.params["reward"], drawn.done.record, config.sample_batch).reshape(len(tasks.rows), -1)

    return score


JUDGES = {"annotator": annotator, "rewards": verifier, "reward_model": reward_model}


def check(config):
    """UserErrors about the settings, before anything is trained."""
    for name, table in (("judge", JUDGES), ("select", feedback.SELECT)):
        if config[name] not in table:
            raise UserError(f"config.{name}={config[name]!r}: choose one of {', '.join(table)}")
    if config.samples < 2:
        raise UserError(f"config.samples={config.samples}: a pair needs 2 or more")


def run_rounds(config, run, judge_of, sample_of=feedback.make_sample, prepare=lambda start: start):
    """The rounds with judge_of(config, run, base, tasks) -> score(drawn, round) -> [p, k]; (last run, metrics).

    sample_of(config, base, tasks, prompts, new) -> sample(policy, round); prepare(run to start from) -> the one to use.
    """
    verifiable.one_process()
    run.truncate(0)  # rounds are made again, or found finished, and logged again
    tasks, held_out = feedback.tasks_of(config, run)
    start = prepare(verifiable.start_of(config, run, tasks))
    base = launch.load(start, default="sft")
    new = verifiable.completion_tokens(config, base.tokenizer, tasks)
    tasks, prompts = verifiable.prompt_columns(config, run, base, tasks, new)
    held_out, eval_prompts = verifiable.prompt_columns(config, run, base, held_out, new)
    evaluate = feedback.make_evaluate(config, base, held_out, eval_prompts, new)
    final = {f"start/{name}": value for name, value in evaluate(start).items()}

    def report(done):
        values = {**done.metrics, **{f"held_out/{name}": value for name, value in evaluate(done.trained).items()}}
        run.log(done.index + 1, {f"round/{name}": value for name, value in values.items()})
        run.note(f"round {done.index + 1} of {config.rounds}: " + ", ".join(f"{n} {value:.3g}" for n, value in values.items()))
        final.update({f"round{done.index + 1}/{name}": value for name, value in values.items()})

    length = min(-(-(prompts["tokens"].shape[1] + new) // 8) * 8, base.model.config.max_length)
    done = rounds.rounds(
        start, config.rounds, sample=sample_of(config, base, tasks, prompts, new), score=judge_of(config, run, base, tasks),
        select=feedback.make_select(config, run, tasks), train=feedback.make_train(config, run, length), report=report,
    )  # fmt: skip
    return done[-1].trained, final


def main(config, run):
    check(config)
    trained, final = run_rounds(config, run, JUDGES[config.judge])
    run.finish(final, [], then=f"chat --run={trained}")


if __name__ == "__main__":
    launch.run(main, "iterative_dpo")
