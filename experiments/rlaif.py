"""Preferences from a judge model and a rubric instead of people: Zephyr's recipe, self-rewarding, critique and revise.

    python -m experiments.rlaif --config.init=runs/sft                                # dSFT -> AI feedback -> dDPO (Zephyr)
    python -m experiments.rlaif --config=configs/rlaif.py:self_rewarding
    python -m experiments.rlaif --config=configs/rlaif.py:constitutional

The judge gives each answer 1 to 5 for four aspects (UltraFeedback, arXiv 2310.01377): the expected rating under its probabilities
of the five numbers. Zephyr (2310.16944): the best of k answers against a random other. Self-rewarding (2401.10020): the policy
is its own judge. Constitutional (2212.08073): the answer against its own revision. Without `judge`, one is fine-tuned on the
ratings of the instr world's simulated raters; how often it agrees with the gold reward is reported.
"""

from __future__ import annotations

import jax
import numpy as np

from experiments import common, completions, feedback, iterative_dpo, rubric
from jaxllm import launch
from jaxllm.core.types import UserError
from jaxllm.worlds.instr_rubric import ASPECTS


def instructions_of(tasks, repeats):
    return [row["prompt"] for row in tasks.rows for _ in range(repeats)]


def by_rubric(params_of, loaded, agreement):
    """judge_of for run_rounds: the mean rating by the parameters params_of(policy); agreement collects its accuracy."""

    def judge_of(config, run, base, tasks):
        rate = rubric.make_rater(config, loaded or base)
        instructions = instructions_of(tasks, config.samples)

        def score(drawn, index):
            scores = rate(params_of(drawn.policy), instructions, drawn.done.texts).mean(axis=1).reshape(len(tasks.rows), -1)
            gold = feedback.gold_scores(tasks, drawn.done, config.samples)
            if gold is not None:
                agreement.append(rubric.pair_agreement(scores, gold))
                run.note(f"round {index + 1}: of pairs with unlike gold rewards the judge orders {agreement[-1]:.1%} rightly")
            return scores

        return score

    return judge_of


def make_revised(judge):
    """sample_of for run_rounds: an answer and its revision for each prompt; the critique is the aspect rated lowest."""

    def sample_of(config, base, tasks, prompts, new):
        draw = completions.sampler(base.model, base.tokenizer, max_new_tokens=new, temperature=config.temperature)
        rate, instructions = rubric.make_rater(config, judge), instructions_of(tasks, 1)

        def sample(policy, index):
            params = launch.load(policy, default="sft").params["policy"]
            key = jax.random.fold_in(jax.random.key(config.seed), index)
            first = completions.complete(draw, params, base.tokenizer, prompts, key, config.sample_batch)
            worst = rate(judge.params["policy"], instructions, first.texts).argmin(axis=1)
            asked = [rubric.revise(i, a, ASPECTS[w]) for i, a, w in zip(instructions, first.texts, worst, strict=True)]
            again = completions.prompt_columns(judge.tokenizer, asked, judge.model.config.max_length - new, "revisions")
            second = completions.complete(draw, judge.params["policy"], judge.tokenizer, again, key, config.sample_batch)
            return feedback.Drawn(policy, beside(first, second))

        return sample

    return sample_of


def beside(a, b):
    """Completions of both, neighbours for each prompt; without records, which have other prompts."""
    both = lambda x, y: np.stack([x, y], axis=1).reshape(-1)  # noqa: E731
    texts = [text for pair in zip(a.texts, b.texts, strict=True) for text in pair]
    return completions.Completions(texts, both(a.ended, b.ended), both(a.lengths, b.lengths), {})


def judge_run(config, run):
    """The judge: config.judge, or one fine-tuned on ratings from the model to start from."""
    return config.judge or rubric.train_judge(config, run, common.need("sft", config.init, config, run))


def zephyr(config, run, agreement):
    """A judge that stays; the best of k answers against a random other."""
    frozen = launch.load(judge_run(config, run), default="sft")
    return iterative_dpo.run_rounds(config, run, by_rubric(lambda policy: frozen.params["policy"], frozen, agreement))


def self_rewarding(config, run, agreement):
    """The latest policy judges its own answers; it starts as a model fine-tuned on answers and on ratings."""
    latest = lambda policy: launch.load(policy, default="sft").params["policy"]  # noqa: E731

    def prepare(start):
        return config.judge or rubric.train_judge(config, run, start, demonstrations=True)

    return iterative_dpo.run_rounds(config, run, by_rubric(latest, None, agreement), prepare=prepare)


def constitutional(config, run, agreement):
    """The judge names the aspect that falls short and rewrites the answer; both versions are rated."""
    frozen = launch.load(judge_run(config, run), default="sft")
    judge_of = by_rubric(lambda policy: frozen.params["policy"], frozen, agreement)
    return iterative_dpo.run_rounds(config, run, judge_of, make_revised(frozen))


RECIPES = {"zephyr": zephyr, "self_rewarding": self_rewarding, "constitutional": constitutional}


def main(config, run):
    for name, table in (("recipe", RECIPES), ("select", feedback.SELECT)):
        if config[name] not in table:
            raise UserError(f"config.{name}={config[name]!r}: choose one of {', '.join(table)}")
    agreement: list[float] = []
    trained, final = RECIPES[config.recipe](config, run, agreement)
    final |= {f"round{i + 1}/judge_agreement": value for i, value in enumerate(agreement)}
    run.finish(final, [], then=f"chat --run={trained}")


if __name__ == "__main__":
    launch.run(main, "rlaif")
