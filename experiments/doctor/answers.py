"""Checks of which turns of a conversation are trained."""

from __future__ import annotations

import numpy as np

from experiments.doctor.capture import Seen
from experiments.doctor.data import Record, on_record
from experiments.doctor.verdict import Verdict, absent, at_most
from jaxllm.data.chat import ROLES

CHATS = ("sft", "dpo", "kto", "reward", "ppo", "grpo", "pairs", "best_of_n")


def answering(r: Record, specials: dict[str, int]) -> np.ndarray:
    """bool [n, l]: which targets belong to an assistant's turn, its end token included, by the role tokens before them."""
    index = np.arange(r["tokens"].shape[1])[None, :]

    def last(hit: np.ndarray) -> np.ndarray:
        return np.maximum.accumulate(np.where(hit, index, -1), axis=1)

    begins = np.pad(r["segments"][:, 1:] != r["segments"][:, :-1], ((0, 0), (1, 0)), constant_values=True)
    opened, closed = last(r["tokens"] == specials["assistant"]), last(np.isin(r["tokens"], [specials["end"], specials["user"]]))
    return (opened > closed) & (opened >= last(begins)) & (r["segments"] != 0)


def has_roles(seen: Seen) -> bool:
    files = getattr(seen.fit["tokenizer"], "files", {})
    return all(n in seen.fit["tokenizer"].specials for n in (*ROLES, "end")) and "chat_template.jinja" not in files


def prompt_untrained(seen: Seen, r: Record) -> Verdict:
    if not has_roles(seen) or seen.experiment not in CHATS:
        return absent("prompt untrained", "no role tokens say where an answer is")
    wrong = r["mask"] & ~answering(r, seen.fit["tokenizer"].specials)
    row = int(np.argmax(r["mask"].any(axis=1)))
    said = f"first trained: {seen.fit['tokenizer'].decode(r['targets'][row][r['mask'][row]].tolist())[:60]!r}"
    do = "only the assistant's tokens and its end are to be trained: the mask is lost, shifted or made before packing"
    return at_most("prompt untrained", wrong.sum() / max(1, r["mask"].sum()), 0, said, do)


def answers_whole(seen: Seen, r: Record) -> Verdict:
    if not has_roles(seen) or seen.experiment not in CHATS:
        return absent("answers whole", "no role tokens say where an answer is")
    inside = answering(r, seen.fit["tokenizer"].specials)
    first = inside & ~np.pad(inside[:, :-1], ((0, 0), (1, 0)))
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
