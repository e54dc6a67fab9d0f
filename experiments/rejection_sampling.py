"""Rejection sampling in rounds: k samples a prompt, the right ones are kept, and a model is fine-tuned on them.

    python -m experiments.rejection_sampling --config.init=runs/sft
    python -m experiments.rejection_sampling --config.data.path=gsm8k.jsonl --config.select=at_random

Each round trains from the base (STaR without its hints, arXiv 2203.14465) or from the latest model (expert iteration). The
model of round i is the run <workdir>/round<i>; accuracy, coverage and lengths are of the samples that the round drew.
In the instr world, seed 0, from a quickstart's sft: .51, .86 and .89 of the samples right in rounds 1 to 3; greedy answers to
held-out prompts .84 right before and .79 after.
"""

from __future__ import annotations

from functools import partial

import jax
import numpy as np

from experiments import completions, sft, verifiable
from jaxllm import launch
from jaxllm.core.types import UserError
from jaxllm.data import chat
from jaxllm.generate.rewards import combine
from jaxllm.train import rounds

SELECT = {
    "shortest": rounds.shortest, "at_random": rounds.at_random, "longest": rounds.longest, "every": rounds.every,
    "unfiltered": rounds.unfiltered,
}  # fmt: skip
TRAIN_FROM = {"base": lambda start, policy: start, "latest": lambda start, policy: policy}
EVALUATED = 128


def check(config):
    """UserErrors about the settings, before anything is trained."""
    for name, table in (("select", SELECT), ("train_from", TRAIN_FROM)):
        if config[name] not in table:
            raise UserError(f"config.{name}={config[name]!r}: choose one of {', '.join(table)}")


def make_sample(config, base, prompts, new):
    """sample(run directory, index) -> Completions of every prompt, `samples` neighbours each."""
    options = {"max_new_tokens": new, "temperature": config.temperature}
    draw = completions.drawer(base, prompts, config.samples, config.sample_batch, **options)

    def sample(policy, index):
        params = launch.load(policy, default="sft").params["policy"]
        key = jax.random.fold_in(jax.random.key(config.seed), index)
        return draw(params, key)

    return sample


def make_select(config, run, tasks):
    """select(completions, scores, index) -> (rows to train on, metrics); counts prompts that no round has solved yet."""
    ever = np.zeros(len(tasks.rows), bool)

    def select(done, scores, index):
        for line in combine.describe(scores):
            run.warn(line, once=line.split(" failed")[0])
        shape = len(tasks.rows), config.samples
        valid, ended, lengths = (x.reshape(shape) for x in (scores.valid, done.ended, done.lengths))
        right = valid & (scores.values.reshape(shape) >= config.right)
        ever[:] = ever | right.any(axis=1)
        rng = np.random.default_rng([config.seed, index])
        # a completion without an end would teach not to stop
        kept = SELECT[config.select](right & ended, lengths, rng) & ended
        rows, texts = [], np.array(done.texts, object).reshape(shape)
        for i in np.flatnonzero(kept.any(axis=1)):
            prompt = chat.as_messages(tasks.prompts[i], "user", tasks.where)
            answers = dict.fromkeys(texts[i][kept[i]])  # the same text twice is one row
            rows += [{"messages": [*prompt, {"role": "assistant", "content": answer}]} for answer in answers if answer]
        counts = {"never_solved": float((~ever).sum()), "excluded": float((~scores.valid).sum()), "rows": float(len(rows))}
        return rows, rounds.solved(right, valid, lengths) | counts

    return select


def make_train(config, run, length):
    """train(start, policy, rows, index) -> the run directory <workdir>/round<index + 1>."""

    def train(start, policy, rows, index):
        where = f"round{index + 1}"
        if len(rows) < 2:
            run.warn(f"{where}: only {len(rows)} row to train on, the model stays as it is")
            return policy
        path = verifiable.write_rows(run.path("data", f"{where}.jsonl"), rows)
        settings = {
            "seed": config.seed + index, "init": TRAIN_FROM[config.train_from](start, policy), "steps": config.steps,
            "batch_size": min(config.batch_size, len(rows) - 1), "optim.lr": config.lr, "data.path": path, "data.length": length,
            "eval_every": 0,
        }  # fmt: skip
        launch.start(sft.main, "sft", settings, run.path(where))
        return str(run.path(where))

    return train


def make_evaluate(config, base, tasks, prompts, new, score):
    """evaluate(run directory) -> share of greedy answers to held-out problems that are right, failures left out."""
    greedy = completions.sampler(base.model, base.tokenizer, max_new_tokens=new, temperature=0.0)

    def evaluate(policy):
        params = launch.load(policy, default="sft").params["policy"]
        size = min(config.sample_batch, len(tasks.rows))
        done = completions.complete(greedy, params, base.tokenizer, prompts, jax.random.key(0), size)
        scores = score(tasks.rows, done.texts, done.ended, done.lengths)
        return float((scores.values[scores.valid] >= config.right).mean()) if scores.valid.any() else 0.0

    return evaluate


def main(config, run):
    check(config)
    verifiable.one_process()
    run.truncate(0)  # rounds are made again, or found finished, and logged again
    tasks, held_out = verifiable.split_tasks(config, run, config.prompts, EVALUATED)
    functions, weights = verifiable.parse_rewards(config.rewards, tasks)
    score = partial(verifiable.score_texts, functions, weights)
    start = verifiable.start_of(config, run, tasks)
    base = launch.load(start, default="sft")
    start = f"{base.workdir}@{base.step}"  # a run with stages would give SFT the one before its own
    new = verifiable.completion_tokens(config, base.tokenizer, tasks)
    tasks, prompts = verifiable.prompt_columns(config, run, base, tasks, new)
    held_out, eval_prompts = verifiable.prompt_columns(config, run, base, held_out, new)
    repeated = [row for row in tasks.rows for _ in range(config.samples)]
    evaluate = make_evaluate(config, base, held_out, eval_prompts, new, score)
    final = {"eval/accuracy_start": evaluate(start)}

    def report(done):
        values = {name: value for name, value in done.metrics.items() if value == value}
        values["held_out_accuracy"] = final["eval/accuracy"] = evaluate(done.trained)
        run.log(done.index + 1, {f"round/{name}": value for name, value in values.items()})
        run.note(f"round {done.index + 1} of {config.rounds}: " + ", ".join(f"{n} {value:.3g}" for n, value in values.items()))
        final.update({f"round{done.index + 1}/{name}": value for name, value in values.items()})

    length = min(-(-(prompts["tokens"].shape[1] + new) // 8) * 8, base.model.config.max_length)
    done = rounds.rounds(
        start, config.rounds, sample=make_sample(config, base, prompts, new),
        score=lambda done, _: score(repeated, done.texts, done.ended, done.lengths), select=make_select(config, run, tasks),
        train=make_train(config, run, length), report=report,
    )  # fmt: skip
    run.finish(final, [], then=f"chat --run={done[-1].trained}")


if __name__ == "__main__":
    launch.run(main, "rejection_sampling")
