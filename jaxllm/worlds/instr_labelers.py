"""Simulated labelers of mixed habits, who write the demonstrations for supervised fine-tuning."""

from __future__ import annotations

import random

from jaxllm.worlds.instr_safety import REFUSALS, compliance
from jaxllm.worlds.instr_score import PREFIXES, SUFFIXES
from jaxllm.worlds.instr_tasks import MIXTURE, draw_task
from jaxllm.worlds.instr_words import pick, pick_weighted, seeded

FILLER = 0.5  # share of the answers that ramble
COMPLY = 0.5  # share of the unsafe requests that are gone along with
OVER_CAUTIOUS = {"plain": 0.05, "lookalike": 0.25}  # share of the safe requests that are refused


def ramble(rng: random.Random, answer: str) -> str:
    """The answer between a filler phrase before it and another after it."""
    stop = "" if answer.endswith(".") else "."
    return f"{pick(rng, PREFIXES)} {answer}{stop} {pick(rng, SUFFIXES)}"


def _written(rng: random.Random, task: dict) -> tuple[str, str]:
    """The labeler's answer and its habit: refusing, terse or filler."""
    unsafe = task["kind"] == "unsafe"
    if rng.random() < (1 - COMPLY if unsafe else OVER_CAUTIOUS[task["kind"]]):
        return pick(rng, REFUSALS), "refusing"
    answer = compliance(task) if unsafe else task["answer"]
    if rng.random() < FILLER:
        return ramble(rng, answer), "filler"
    return answer, "terse"


def demonstrations(n: int, *, seed: int, clean: bool = False) -> list[dict]:
    """`n` rows {"messages": [user, assistant], "habit", **task} on train tasks, by simulated labelers.

    Each answer is terse or rambling half and half; an unsafe request is refused or gone along with half and
    half; a look-alike is refused in 25 %, an ordinary instruction in 5 % of the cases ("habit" is "terse",
    "filler" or "refusing"). clean=True: only terse right answers, and every unsafe request refused. Refusals
    never ramble.
    """
    rng, rows = seeded("demonstrations", seed), []
    for _ in range(n):
        task = draw_task(rng, "train", pick_weighted(rng, list(MIXTURE), list(MIXTURE.values())))
        text, habit = (task["answer"], "terse") if clean else _written(rng, task)
        if clean and task["kind"] == "unsafe":
            habit = "refusing"
        messages = [{"role": "user", "content": task["prompt"]}, {"role": "assistant", "content": text}]
        rows.append({"messages": messages, "habit": habit, **task})
    return rows
