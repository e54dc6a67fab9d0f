"""Tasks in T5's form, "task: input" -> target, over the closed vocabulary of the world of instructions.

Splits are disjoint by input (85 % train, 15 % test, by sha256); what a sum's terms are counts, not their order. Everything
depends on the seed alone, in every process and Python version.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from jaxllm.core.types import UserError
from jaxllm.worlds import instr_tasks
from jaxllm.worlds import instr_words as words
from jaxllm.worlds.instr_words import between, draw, pick, seeded, share_of

SPLITS = ("train", "test")
TEST = 0.15
ONSETS, VOWELS = "bdgklmnprstvz", "aeiou"
LIKED = words.list_of("good happy new soft rich quiet")
DISLIKED = words.list_of("bad sad old hard poor loud")


def foreign(word: str) -> str:
    """The word of the made-up language Ranu: two or three syllables that its sha256 chooses; no two words here share one."""
    rng = seeded("ranu", word)
    return "".join(pick(rng, ONSETS) + pick(rng, VOWELS) for _ in range(between(rng, 2, 3)))


def _translate(rng: random.Random) -> tuple[str, str]:
    """Ranu puts the adjective behind its noun, and says `e` for and."""
    phrases = [(pick(rng, words.COLOURS), pick(rng, words.ANIMALS)) for _ in range(between(rng, 1, 2))]
    return (
        " and ".join(f"{colour} {animal}" for colour, animal in phrases),
        " e ".join(f"{foreign(animal)} {foreign(colour)}" for colour, animal in phrases),
    )


def _sentiment(rng: random.Random) -> tuple[str, str]:
    liked, negated = rng.random() < 0.5, rng.random() < 0.3
    noun, word = pick(rng, words.FOODS + words.THINGS + words.PLACES), pick(rng, LIKED if liked else DISLIKED)
    verdict = "positive" if liked != negated else "negative"
    return f"the {noun} was {'not ' if negated else ''}{word}", verdict


def _copy(rng: random.Random) -> tuple[str, str]:
    text = " ".join(draw(rng, words.WORDS, between(rng, 1, 4)))
    return text, text


def _reverse(rng: random.Random) -> tuple[str, str]:
    items = draw(rng, words.NOUNS, between(rng, 2, 4))
    return " ".join(items), " ".join(items[::-1])


def _add(rng: random.Random) -> tuple[str, str]:
    a, b = between(rng, 1, 30), between(rng, 1, 30)
    return f"{a} plus {b}", str(a + b)


def _opposite(rng: random.Random) -> tuple[str, str]:
    items = draw(rng, words.ADJECTIVES, 2)
    return " ".join(items), " ".join(words.OPPOSITE_OF[item] for item in items)


def _question(rng: random.Random) -> tuple[str, str]:
    task = instr_tasks.draw_task(rng, "train" if rng.random() < 0.9 else "test", "plain")
    return task["prompt"], task["answer"]


# task -> (one example, the training examples there are by default): the names are the prefixes
TASKS: dict[str, tuple[Callable[[random.Random], tuple[str, str]], int]] = {
    "question": (_question, 24_000),
    "translate English to Ranu": (_translate, 6000),
    "copy": (_copy, 12_000),
    "reverse": (_reverse, 12_000),
    "opposite": (_opposite, 600),
    "sentiment": (_sentiment, 600),
    "add": (_add, 400),
}


def split_of(task: str, source: str) -> str:
    """train or test, by the input alone."""
    key = " ".join(sorted(source.split())) if task == "add" else source
    return "test" if share_of("text2text", task, key) < TEST else "train"


def rows(task: str, split: str, n: int, *, seed: int) -> list[dict[str, str]]:
    """n rows {"task", "input", "target"} of one split; test rows are different from one another while fresh ones are found.

    UserError: an unknown task or split.
    """
    if task not in TASKS or split not in SPLITS:
        raise UserError(f"task {task!r}, split {split!r}: choose among {', '.join(TASKS)}; {', '.join(SPLITS)}")
    make, rng, found, seen = TASKS[task][0], seeded("text2text", task, split, seed), [], set()
    tries = 0
    while len(found) < n:
        source, target = make(rng)
        tries += 1
        if split_of(task, source) != split or (split == "test" and source in seen and tries < 50 * n):
            continue
        seen.add(source)
        found.append({"task": task, "input": source, "target": target})
    return found


def mixture(split: str, *, seed: int, sizes: Mapping[str, int] | None = None) -> dict[str, list[dict[str, str]]]:
    """task -> rows, as many as `sizes` says (default: what TASKS says)."""
    sizes = {name: n for name, (_, n) in TASKS.items()} if sizes is None else sizes
    return {name: rows(name, split, n, seed=seed) for name, n in sizes.items()}
