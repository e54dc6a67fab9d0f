"""Checks of which turns of a conversation are trained."""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.doctor.capture import Seen
from experiments.doctor.data import CHATS, Record, on_record
from experiments.doctor.verdict import Verdict, absent, at_most
from jaxllm.data import chat

UNKNOWN = "no conversations, or a published template: `template grows` has a conversation of its own"


def markers(tokenizer: Any) -> tuple[list[int], list[int]] | None:
    """(the tokens that open an answer, those of which one closes it) as `chat` writes them; None of a published template."""
    if "chat_template.jinja" in getattr(tokenizer, "files", {}):
        return None
    specials = tokenizer.specials
    if all(name in specials for name in (*chat.ROLES, "end")):
        return [specials["assistant"]], [specials["end"], specials["user"]]
    return list(tokenizer.encode(chat.PLAIN["assistant"])), [specials["eos"]]


def answering(r: Record, opening: list[int], closing: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """bool [n, l] twice: targets that belong to an assistant's turn, its end token included, and the first of each turn."""
    tokens, index = r["tokens"], np.arange(r["tokens"].shape[1])[None, :]

    def last(hit: np.ndarray) -> np.ndarray:
        return np.maximum.accumulate(np.where(hit, index, -1), axis=1)

    def earlier(n: int) -> np.ndarray:
        return np.pad(tokens, ((0, 0), (n, 0)), constant_values=-1)[:, : tokens.shape[1]]

    begins = np.pad(r["segments"][:, 1:] != r["segments"][:, :-1], ((0, 0), (1, 0)), constant_values=True)
    opens = np.all([earlier(n) == token for n, token in enumerate(reversed(opening))], axis=0)
    opened, closed = last(opens), last(np.isin(tokens, closing))
    inside = (opened > closed) & (opened >= last(begins)) & (r["segments"] != 0)
    return inside, inside & opens


def prompt_untrained(seen: Seen, r: Record) -> Verdict:
    if seen.experiment not in CHATS or (marks := markers(seen.fit["tokenizer"])) is None:
        return absent("prompt untrained", UNKNOWN)
    wrong = r["mask"] & ~answering(r, *marks)[0]
    row = int(np.argmax(r["mask"].any(axis=1)))
    said = f"first trained: {seen.fit['tokenizer'].decode(r['targets'][row][r['mask'][row]].tolist())[:60]!r}"
    do = "only the assistant's tokens and its end are to be trained: the mask is lost, shifted or made before packing"
    return at_most("prompt untrained", wrong.sum() / max(1, r["mask"].sum()), 0, said, do)


def answers_whole(seen: Seen, r: Record) -> Verdict:
    if seen.experiment not in CHATS or (marks := markers(seen.fit["tokenizer"])) is None:
        return absent("answers whole", UNKNOWN)
    inside, first = answering(r, *marks)
    turn = np.cumsum(first, axis=1) + np.arange(len(first))[:, None] * (first.shape[1] + 1)
    places = np.bincount(turn[inside])
    trained = np.bincount(turn[inside], r["mask"][inside], len(places))
    partly = (trained > 0) & (trained < places)
    said = f"of {int((trained > 0).sum()):,} answers {int(partly.sum()):,} are trained in part"
    do = "the mask is off by one: align it with targets, not with tokens"
    return at_most("answers whole", partly.sum() / max(1, (trained > 0).sum()), 0, said, do)


CHECKS = {
    name: on_record(name, check)
    for name, check in {"prompt untrained": prompt_untrained, "answers whole": answers_whole}.items()
}
