"""The life cycle of a language model on one machine, from raw text to an aligned model, in about six minutes on two cores.

    python -m experiments.quickstart
    python -m experiments.quickstart --workdir=runs/mine --config.seed=1
    python -m experiments.quickstart --config.over_optimise=True

Stages lie in <workdir>/{pretrain,sft,pairs,reward,dpo,ppo}; result.json holds the claims; repeating the command resumes.
"""

from __future__ import annotations

import json
import time

import numpy as np

from experiments import dpo, pairs, ppo, pretrain, reward, sft
from experiments.quickstart import judge, pace
from experiments.quickstart.claims import claims_of
from jaxllm import launch
from jaxllm.report import figures

HEADLINE = (
    "sft/greedy_exact_test", "reward/accuracy", "sft/gold", "dpo/gold", "ppo/gold", "ppo/refused_unsafe", "ppo/refused_lookalike",
    "ppo/exact", "ppo/length", "ppo/kl",
)  # fmt: skip


def stages(config, run, steps):
    """(stage, main, overrides) in the order of the life cycle."""
    at = {name: str(run.path(name)) for name in launch.STAGES + ("pairs",)}
    data = {"data.path": f"{at['pairs']}/train.jsonl", "data.eval_path": f"{at['pairs']}/held_out.jsonl"}
    yield "pretrain", pretrain.main, {"steps": steps["pretrain_steps"]}
    yield "sft", sft.main, {"steps": steps["sft_steps"], "init": at["pretrain"]}
    yield "pairs", pairs.main, {"init": at["sft"], "prompts": config.pair_prompts}
    yield "reward", reward.main, {"steps": config.reward_steps, "init": at["sft"], **data}
    yield "dpo", dpo.main, {"steps": config.dpo_steps, "init": at["sft"], **data}
    yield "ppo", ppo.main, {"steps": config.ppo_steps, "init": at["sft"], "reward_model": at["reward"]}
    if config.over_optimise:
        overrides = {"steps": 3 * config.ppo_steps, "init": at["ppo"], "reward_model": at["reward"], "kl_coef": 0.0}
        yield "over_optimise", ppo.main, overrides


def experiment_of(stage):
    return "ppo" if stage == "over_optimise" else stage


def evaluate(config, run):
    """Judge every stage; (metrics, per-prompt scores of the policies, calibration)."""
    loaded = judge.load_all(run.workdir)
    cache: dict = {}
    metrics = judge.judge_base(loaded["pretrain"], loaded["sft"], config, cache)
    policies = ["sft", "dpo", "ppo"]
    if config.over_optimise:
        loaded["over_optimise"] = launch.load(run.path("over_optimise"))
        policies.append("over_optimise")
        metrics |= over_optimisation(run)
    scores = {name: judge.judge_policy(loaded[name], loaded["sft"], config, cache) for name in policies}
    for name, s in scores.items():
        metrics |= judge.summary(name, s)
    for name in policies[1:]:
        gain, se = judge.paired(scores[name]["gold"], scores["sft"]["gold"])
        metrics |= {f"{name}/gain": gain, f"{name}/gain_se": se}
    reward_metrics, held_out = judge.judge_reward(loaded["reward"], loaded["sft"], run.path("pairs", "held_out.jsonl"))
    return metrics | reward_metrics | first_ppo(run), scores, held_out


def first_ppo(run):
    """PPO's first logged iteration: before any update the ratio is 1 and the KL 0."""
    first = json.loads(run.path("ppo", "metrics.jsonl").read_text().splitlines()[0])
    return {"ppo/first_ratio": first["first/val/ratio"], "ppo/first_kl": first["objective/kl"]}


def over_optimisation(run):
    """The reward model's mean score at the start and at the end of PPO without KL, in its own units."""
    rows = [json.loads(line) for line in run.path("over_optimise", "metrics.jsonl").read_text().splitlines()]
    scores = [r["objective/scores"] for r in rows if "objective/scores" in r]
    return {"over_optimise/score_first": scores[0], "over_optimise/score_last": scores[-1]}


def draw(run, metrics, scores, held_out):
    """The pictures that the report shows first."""
    names = list(scores)
    gold = [metrics[f"{n}/gold"] for n in names]
    run.figure(
        "gold", figures.bar_plot(names, gold, title="Mean gold reward (± s.e.)", errors=[metrics[f"{n}/gold_se"] for n in names])
    )
    refusals = {k: [metrics[f"{n}/refused_{k}"] for n in names] for k in ("unsafe", "lookalike", "plain")}
    for kind, values in refusals.items():
        run.figure(f"refused_{kind}", figures.bar_plot(names, values, title=f"Refuses {kind} requests"))
    run.figure("length", figures.bar_plot(names, [metrics[f"{n}/length"] for n in names], title="Mean length (tokens)"))
    predicted, observed, counts = judge.calibration(held_out["margin"])
    run.figure("calibration", figures.calibration_plot(predicted, observed, counts, title="Reward model on held-out pairs"))


def show(run, scores):
    """The same prompts answered by every policy."""
    run.truncate(-1)  # those of a try that was stopped here
    rng = np.random.default_rng(0)
    for i in rng.choice(len(scores["sft"]["text"]), 12, replace=False):
        for name, s in scores.items():
            run.sample(0, s["prompt"][i], s["text"][i], stage=name, kind=str(s["kind"][i]), gold=float(s["gold"][i]))


def main(config, run):
    began = time.time()
    steps = run.choose(lambda: pace.choose(pace.measure(), config.minutes * 60, config.pretrain_steps, config.sft_steps))
    minutes = pace.seconds(steps["step_seconds"], steps["pretrain_steps"], steps["sft_steps"]) / 60
    until = time.strftime("%H:%M", time.localtime(began + 60 * minutes))
    run.note(
        f"one train step takes {steps['step_seconds'] * 1e3:.0f} ms here: {steps['pretrain_steps']} steps of pretraining, "
        f"{steps['sft_steps']} of SFT; about {minutes:.1f} minutes in all, until {until}"
    )
    if minutes > config.minutes * 1.05:
        run.warn(f"that is more than the {config.minutes:g} minutes asked for: the claims need this much training")
    for stage, stage_main, overrides in stages(config, run, steps):
        launch.start(stage_main, experiment_of(stage), {"seed": config.seed, **overrides}, run.path(stage), stage_of=run.workdir)
    run.note("evaluating on test-only prompts")
    metrics, scores, held_out = evaluate(config, run)
    draw(run, metrics, scores, held_out)
    show(run, scores)
    headline = {name: metrics[name] for name in HEADLINE}  # first in the report
    run.finish({**headline, **metrics, "minutes": (time.time() - began) / 60, **steps}, claims_of(metrics))
    run.note(f"talk to it:  python -m experiments.chat --run={run.workdir}")


if __name__ == "__main__":
    launch.run(main, "quickstart")
