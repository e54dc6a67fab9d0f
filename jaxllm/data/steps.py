"""Solutions with a label for every step, to records for a process reward model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxllm.core.types import UserError
from jaxllm.data import chat, pack
from jaxllm.data.tokenizer import Tokenizer

SEPARATOR = "\n"  # ends a step; its last token is where the step is judged


def normalise_steps(row: Any, where: str) -> dict[str, Any]:
    """{"prompt": messages, "completions": [str], "labels": [bool]} of a row in TRL's stepwise form; UserErrors name the row."""
    have = chat.columns(row, where)
    for name in ("prompt", "completions", "labels"):
        if name not in have:
            raise UserError(f"{where} has no `{name}` (steps need `prompt`, `completions` and `labels`); {chat.describe(have)}")
    steps, labels = row["completions"], row["labels"]
    if not isinstance(steps, Sequence) or isinstance(steps, str) or not all(isinstance(s, str) for s in steps):
        raise UserError(f"{where}: `completions` must be a list of steps, each a text")
    if len(steps) != len(labels) or not steps:
        raise UserError(f"{where}: {len(steps)} steps in `completions` and {len(labels)} `labels`: give one label for each step")
    if not all(label in (0, 1) for label in labels):
        bad = next(label for label in labels if label not in (0, 1))
        raise UserError(f"{where}: the label {bad!r} must be true (the step is right) or false")
    prompt = chat.as_messages(row["prompt"], "user", f"{where}, prompt")
    return {"prompt": prompt, "completions": list(steps), "labels": [bool(x) for x in labels]}


def encode_steps(tokenizer: Tokenizer, rows: Iterable[Any], length: int) -> tuple[dict[str, Any], pack.Report]:
    """({record: {tokens, segments}, step_ends: bool, step_labels: bool, all [n, length]}, report) for `reward.process_loss`.

    The steps follow the opening of the assistant's turn, each closed by a line end, at whose token it is judged. Steps that end
    beyond `length` are cut; a row of which none is left is dropped; both are counted.
    """
    rows = [normalise_steps(row, f"row {i + 1}") for i, row in enumerate(rows)]
    encoded = [_encode(tokenizer, row) for row in rows]
    kept = [i for i, (_, ends, _) in enumerate(encoded) if ends[:length].any()]
    shape = (len(kept), length)
    record = {name: np.zeros(shape, np.int32) for name in ("tokens", "segments")}
    ends, labels = np.zeros(shape, bool), np.zeros(shape, bool)
    for place, i in enumerate(kept):
        tokens, step_ends, step_labels = (x[:length] for x in encoded[i])
        n = len(tokens)
        record["tokens"][place, :n], record["segments"][place, :n] = tokens, 1
        ends[place, :n], labels[place, :n] = step_ends, step_labels
    lost = sorted(set(range(len(rows))) - set(kept))
    used, steps = int((record["segments"] != 0).sum()), int(ends.sum())
    report = {
        "rows": len(kept), "examples": len(rows), "tokens": used, "trained_tokens": steps, "dropped": len(lost),
        "fill": used / max(1, ends.size), "truncated": sum(len(encoded[i][0]) > length for i in kept), "untrained": len(lost),
        "first_untrained": lost[0] if lost else None, "steps": steps,
        "steps_cut": int(sum(e.sum() for _, e, _ in encoded)) - steps,
        "lengths": pack.histogram(np.array([len(t) for t, _, _ in encoded])),
    }  # fmt: skip
    return {"record": record, "step_ends": ends, "step_labels": labels}, report


def _encode(tokenizer: Tokenizer, row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, where a step ends, whether it was right) of one row, each [m]."""
    tokens = chat.prompt_ids(tokenizer, row["prompt"]).tolist()
    at = []
    for step in row["completions"]:
        tokens += tokenizer.encode(step + SEPARATOR)
        at.append(len(tokens) - 1)
    ends, labels = np.zeros(len(tokens), bool), np.zeros(len(tokens), bool)
    ends[at] = True
    labels[at] = row["labels"]
    return np.array(tokens, np.int32), ends, labels
