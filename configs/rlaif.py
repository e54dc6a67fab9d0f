"""Preferences from a judge model and a rubric. Variants: zephyr (the default), self_rewarding, constitutional."""

from configs import iterative_dpo

VARIANTS = {
    "zephyr": dict(rounds=1, steps=80),
    "self_rewarding": dict(recipe="self_rewarding", rounds=3, steps=40),
    "constitutional": dict(recipe="constitutional", rounds=1, steps=80, samples=2, select="best_and_worst"),
}


def get_config(variant=None):
    c = iterative_dpo.get_config()
    for name in ("rewards", "reward_model"):
        del c[name]
    c.recipe = "zephyr"  # zephyr, self_rewarding, constitutional
    c.judge = ""  # a run that judges; empty: one is fine-tuned on the simulated raters' ratings
    c.judge_rows = 2000  # answers whose ratings the judge is trained on
    c.judge_steps = 400
    c.judge_length = 96  # tokens of a rating row
    c.select = "best_and_other"  # best_and_worst, best_and_other (a random lower one, as Zephyr)
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"no variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    c.update(VARIANTS[variant or "zephyr"])
    return c
