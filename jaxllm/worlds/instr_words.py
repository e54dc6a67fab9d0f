"""The closed vocabulary of the world of instructions, and the seeded draws everything in it is made of.

Only `random.Random.random` is drawn from: its sequence is the same in every Python version, which those of
`choice`, `sample` and `shuffle` are not promised to be.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence


def list_of(text: str, separator: str | None = None) -> list[str]:
    """The items of a table that is written as one string."""
    return text.split(separator)


ANIMALS = list_of("cat dog cow pig hen fox bear lion wolf goat duck horse mouse sheep frog fish")
COLOURS = list_of("red blue green black white pink brown grey yellow purple")
FOODS = list_of("apple bread cake rice milk soup egg corn tea salt bean pear lemon honey")
THINGS = list_of("book door lamp desk cup box key bag pen hat shoe coat ball clock chair table bed")
PLACES = list_of("park school shop farm beach zoo lake bank river hotel")
NATURE = list_of("tree rain snow star moon sun wind leaf rock sand")
NAMES = list_of("Ann Ben Tom Sam Eva Max Kim Leo Mia Jan Lucy Paul")
OPPOSITES = tuple(
    tuple(pair.split("-"))
    for pair in list_of(
        "hot-cold big-small old-new fast-slow day-night good-bad up-down left-right wet-dry hard-soft "
        "high-low early-late long-short dark-light full-empty rich-poor near-far loud-quiet thick-thin "
        "happy-sad"
    )
)
OPPOSITE_OF = {a: b for a, b in OPPOSITES} | {b: a for a, b in OPPOSITES}
ADJECTIVES = list(OPPOSITE_OF)
NOUNS = ANIMALS + FOODS + THINGS + NATURE
WORDS = NOUNS + COLOURS + PLACES + ADJECTIVES
CATEGORIES = {"animal": ANIMALS, "colour": COLOURS, "food": FOODS, "place": PLACES}


def seeded(*parts: object) -> random.Random:
    """A generator whose seed is the sha256 of the parts: the same in every process and Python version."""
    digest = hashlib.sha256("|".join(str(part) for part in parts).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))


def share_of(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts alone (sha256), for splits by hash."""
    digest = hashlib.sha256("|".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def pick(rng: random.Random, items: Sequence):
    """One of the items, uniformly."""
    return items[int(rng.random() * len(items))]


def pick_weighted(rng: random.Random, items: Sequence, weights: Sequence[float]):
    """One of the items, with probability proportional to its weight."""
    threshold = rng.random() * sum(weights)
    for item, weight in zip(items, weights, strict=True):
        threshold -= weight
        if threshold < 0:
            return item
    return items[-1]


def draw(rng: random.Random, items: Sequence, count: int) -> list:
    """`count` different items, in random order."""
    chosen: list = []
    while len(chosen) < count:
        item = pick(rng, items)
        if item not in chosen:
            chosen.append(item)
    return chosen


def between(rng: random.Random, low: int, high: int) -> int:
    """An integer from low to high, both included."""
    return low + int(rng.random() * (high - low + 1))


def article(word: str) -> str:
    """The word with its indefinite article."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
