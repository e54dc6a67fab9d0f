"""Rewards of a completion's form: pattern, length, repetition; and of its honesty: the calibrated abstention table."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping

LONGEST = 20_000  # characters; longer texts have no reward of form
SCHULMAN = {
    ("unhedged", True): 1.0, ("hedged", True): 0.5, ("abstain", True): 0.0,
    ("unhedged", False): -4.0, ("hedged", False): -2.0, ("abstain", False): 0.0,
}  # fmt: skip
ABSTAINS = re.compile(
    r"\b(?:i do(?: not|n't|n’t) know|i(?: am|'m|’m) not sure|i cannot answer|i can(?:'t|’t) answer|idk)\b",
    re.IGNORECASE,
)
HEDGES = re.compile(r"\b(?:i think|i believe|probably|likely|maybe|perhaps|i guess|possibly|it might be)\b", re.IGNORECASE)


def format_match(text: str, pattern: str, *, most: int = LONGEST) -> float:
    """1 when the whole text matches the regular expression (dot matches line breaks), else 0; 0 above `most` characters.

    A pattern may still take exponential time: run a user's in a worker (combine.External), where a call has a time limit.
    """
    return float(len(text) <= most and _compiled(pattern).fullmatch(text) is not None)


@functools.lru_cache(16)
def _compiled(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"the pattern {pattern[:80]!r} is no regular expression: {error}") from None


def length_reward(length: int, target: int) -> float:
    """1 - |1 - length / target|, at least -1: 1 at the target, 0 for an empty text (the length-only PPO of arXiv 2310.03716)."""
    if target <= 0:
        raise ValueError(f"target={target}: the target length is at least 1")
    return max(-1.0, 1.0 - abs(1.0 - length / target))


def repetition_penalty(text: str, *, n: int = 3, most: float = -1.0, longest: int = LONGEST) -> float:
    """most * (1 - distinct n-grams / n-grams) over words (arXiv 2502.03373): 0 without repetition or below n words.

    Only the first `longest` characters count.
    """
    words = text[:longest].casefold().split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return most * (1.0 - len(set(grams)) / len(grams)) if grams else 0.0


def stance(text: str) -> str:
    """ "abstain", "hedged" or "unhedged", by the phrases of ABSTAINS and HEDGES in the text's first characters."""
    if ABSTAINS.search(text[:LONGEST]):
        return "abstain"
    return "hedged" if HEDGES.search(text[:LONGEST]) else "unhedged"


def abstention(
    text: str, gold: str, *, correct: Callable[[str, str], bool], table: Mapping[tuple[str, bool], float] = SCHULMAN,
    stance: Callable[[str], str] = stance,
) -> float:  # fmt: skip
    """table[stance, right or wrong]: the proper reward for knowing what one knows (J. Schulman, Berkeley, April 2023).

    With confidence p the default table pays 5p - 4 unhedged, 2.5p - 2 hedged and 0 for abstaining: all three cross at
    p = 0.8, and hedging is nowhere strictly best. With -1 for hedged and wrong it is, for 2/3 < p < 6/7.
    """
    how = stance(text)
    return float(table[how, how != "abstain" and bool(correct(text, gold))])


def format_row(row: Mapping[str, str], pattern: str) -> float:
    """format_match of a row's completion: what a worker calls."""
    return format_match(row["completion"], pattern)
