"""Completions labelled good or bad, one a row: to a prompt, a completion and a label, and to records for KTO."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxllm.core.types import UserError
from jaxllm.data import chat, pack, pairs
from jaxllm.data.chat import Example, Messages
from jaxllm.data.tokenizer import Tokenizer

Row = dict[str, Any]  # {"prompt": messages, "completion": messages, "label": bool}


def normalise_rows(row: Any, where: str) -> list[Row]:
    """The labelled completions of a row: one of {prompt, completion, label}, two of a preference pair (good, then bad).

    prompt and completion are a str or messages, label is a bool, 0 or 1; pairs are what `pairs.normalise_pair` reads. Rows
    that have this form already pass unchanged. UserErrors name the row, and the right experiment for other kinds of data.
    """
    have = chat.columns(row, where)
    if {"chosen", "rejected"} & set(have):
        return from_pair(pairs.normalise_pair(row, where))
    if not {"completion", "label"} <= set(have):
        raise UserError(f"{where} {_missing(have)}")
    if row["label"] not in (True, False):
        raise UserError(f"{where} has the label {str(row['label'])[:40]!r}: use true for a good completion, false for a bad one")
    prompt = pairs.read_prompt(row.get("prompt") or [], where)
    completion = pairs.read_completion(prompt, row["completion"], f"{where}, completion")
    return [{"prompt": prompt, "completion": completion, "label": bool(row["label"])}]


def from_pair(pair: pairs.Pair) -> list[Row]:
    """The two rows of a normalised pair: the chosen completion is good, the rejected one bad."""
    return [{"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"} for side in pairs.SIDES]


def mismatches(prompts: Sequence[Any]) -> np.ndarray:
    """For each row the next row (in a ring) with another prompt, or the next one where all prompts are the same: int [n]."""
    n = len(prompts)
    after = (np.arange(n) + 1) % max(n, 1)
    if all(p == prompts[0] for p in prompts):
        return after
    # backwards, twice around the ring: a row whose neighbour has its prompt takes its neighbour's partner
    for i in range(2 * n - 1, -1, -1):
        here, following = i % n, (i + 1) % n
        if prompts[here] == prompts[following]:
            after[here] = after[following]
    return after


def encode_unpaired(tokenizer: Tokenizer, rows: Iterable[Any], length: int) -> tuple[dict[str, Any], pack.Report]:
    """({"completion", "mismatched": sequence records; "label": bool [n]}, report) of raw or normalised rows or pairs.

    mismatched is each row's prompt with the completion of the next row that has another prompt, for KTO's estimate of KL. The
    mask is True on the completion's assistant content and end tokens only. Rows of which nothing is trained within `length` are
    left out and counted (dropped, untrained), cut ones too (truncated); good and bad count the labels.
    """
    given = [r for i, row in enumerate(rows) for r in normalise_rows(row, f"row {i + 1}")]
    examples = [_encode(tokenizer, r["prompt"], r["completion"]) for r in given]
    lost = [i for i, e in enumerate(examples) if not pack.trained(e, length)]
    gone = set(lost)
    kept = [r for i, r in enumerate(given) if i not in gone]
    completion, report = pack.pad([e for i, e in enumerate(examples) if i not in gone], length)
    partner = mismatches([r["prompt"] for r in kept])
    others = [_encode(tokenizer, r["prompt"], kept[j]["completion"]) for r, j in zip(kept, partner, strict=True)]
    label = np.array([r["label"] for r in kept], bool)
    report |= {
        "examples": len(given), "dropped": len(lost),
        **pack.nothing_trained(lost, examples[lost[0]] if lost else None, length),
        "good": int(label.sum()), "bad": int((~label).sum()),
    }  # fmt: skip
    return {"completion": completion, "mismatched": pack.pad(others, length)[0], "label": label}, report


def _encode(tokenizer: Tokenizer, prompt: Messages, completion: Messages) -> Example:
    """A prompt and its completion; nothing of the prompt is trained, not even the assistant's turns."""
    before = len(chat.encode_chat(tokenizer, prompt).tokens)
    whole = chat.encode_chat(tokenizer, prompt + completion)
    whole.mask[:before] = False  # the template only appends
    return whole


def _missing(have: list[str]) -> str:
    """What a row without a completion and a label looks like, and where it belongs."""
    if "messages" in have or {"prompt", "completion"} <= set(have):
        shown = "messages" if "messages" in have else "prompt, completion"
        return (
            f"looks like SFT data (columns: {shown}): use python -m experiments.sft for it, "
            "or give `prompt`, `completion` and a bool `label`"
        )
    if have == ["text"]:
        return "has only `text`: use python -m experiments.pretrain for plain text"
    absent = " and ".join(f"`{c}`" for c in ("completion", "label") if c not in have)
    return f"has no {absent}; {chat.describe(have)}"
