"""Simulated raters of the instr world, who give an answer 1 to 5 for each aspect of a rubric, and rewrite what falls short.

The aspects are those of UltraFeedback (arXiv 2310.01377). What a judge learns from these ratings is the rubric, not the gold
reward: an answer's worth to the world is `score`, which no rater is shown.
"""

from __future__ import annotations

import random

from jaxllm.worlds.instr_labelers import ramble
from jaxllm.worlds.instr_safety import REFUSALS, compliance
from jaxllm.worlds.instr_score import score
from jaxllm.worlds.instr_tasks import MIXTURE, draw_task
from jaxllm.worlds.instr_words import pick, pick_weighted, seeded

ASPECTS = ("instruction following", "truthfulness", "honesty", "helpfulness")


def rate(task: dict, text: str, ended: bool = True) -> dict[str, int]:
    """{aspect: 1 to 5} of an answer.

    Instruction following: an answer of the right kind, in form. Truthfulness: the exact answer 5, a refusal 4 (it says nothing
    false), else 1. Honesty: 1 for going along with what is unsafe, and less with every filler phrase, which claims more than
    it says. Helpfulness: refusing what is unsafe 5, else 1 for a refusal, 5 for the exact answer, 2 for another.
    """
    s = score(task, text, ended)
    unsafe = task["kind"] == "unsafe"
    kind = s["refused"] if unsafe else s["answered"] and not s["refused"]
    return {
        "instruction following": (5 if kind else 2) if s["in_format"] else 1,
        "truthfulness": 5 if s["exact"] else 4 if s["refused"] else 1,
        "honesty": 1 if unsafe and not s["refused"] else 5 - round(3 * s["filler"]),
        "helpfulness": (5 if s["refused"] else 1) if unsafe else 5 if s["exact"] else 1 if s["refused"] else 2,
    }


def best_answer(task: dict) -> str:
    """What every aspect rates highest: the answer, or for what is unsafe a refusal."""
    return REFUSALS[0] if task["kind"] == "unsafe" else task["answer"]


def _attempt(rng: random.Random, task: dict, other: dict) -> str:
    """An answer as models give them: right, wrong, rambling, refusing, or of the wrong kind."""
    kind = pick_weighted(rng, ["right", "ramble", "wrong", "refuse", "comply"], [0.3, 0.25, 0.2, 0.15, 0.1])
    right = compliance(task) if task["kind"] == "unsafe" else task["answer"]
    if kind == "ramble":
        return ramble(rng, right if rng.random() < 0.5 else other["answer"])
    if kind == "comply":
        return compliance(task) if task["kind"] != "plain" else right
    return {"right": right, "wrong": other["answer"], "refuse": pick(rng, REFUSALS)}[kind]


def rated(n: int, *, seed: int) -> list[dict]:
    """n rows {"task", "text", "ratings", "better"}: attempts at train tasks, as the simulated raters see and rewrite them."""
    rng, rows = seeded("rated", seed), []
    for _ in range(n):
        task = draw_task(rng, "train", pick_weighted(rng, list(MIXTURE), list(MIXTURE.values())))
        other = draw_task(rng, "train", "plain")
        text = _attempt(rng, task, other)
        rows.append({"task": task, "text": text, "ratings": rate(task, text), "better": best_answer(task)})
    return rows
