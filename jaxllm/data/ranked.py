"""Rankings of several completions, and pairs with a margin: to one record of completions, the best first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxllm.core.types import UserError
from jaxllm.data import chat, pack
from jaxllm.data.chat import Example
from jaxllm.data.pairs import lost_side, normalise_pair
from jaxllm.data.tokenizer import Tokenizer

Ranking = dict[str, Any]  # {"prompt": messages, "ranked": [messages, ...]} and, of pairs, "margin": float


def is_ranked(row: Any) -> bool:
    """Whether a row is one of ours: it has `ranked`, or `margin` beside a pair."""
    have = chat.columns(row, "row") if isinstance(row, Mapping) else []
    return "ranked" in have or ("margin" in have and {"chosen", "rejected"} <= set(have))


def normalise_ranked(row: Any, where: str) -> Ranking:
    """A ranking of {"prompt", "ranked": [best, ..., worst]}, each side as in a pair, or of a pair with or without `margin`.

    A row that has this form already passes unchanged. UserErrors name the row and the place.
    """
    have = chat.columns(row, where)
    if "ranked" in have:
        return _ranking(row, where)
    pair = normalise_pair(row, where)
    made = {"prompt": pair["prompt"], "ranked": [pair["chosen"], pair["rejected"]]}
    return {**made, "margin": _margin(row["margin"], where)} if "margin" in have else made


def _ranking(row: Any, where: str) -> Ranking:
    ranked = row["ranked"]
    if not isinstance(ranked, Sequence) or isinstance(ranked, str | bytes) or len(ranked) < 2:
        raise UserError(f"{where}: `ranked` must be a list of at least two completions, the best first")
    if row.get("prompt") is None:
        raise UserError(f"{where} has `ranked` but no `prompt`: name the prompt that the completions answer")
    sides = [
        normalise_pair({"prompt": row["prompt"], "chosen": x, "rejected": x}, f"{where}, ranked {i + 1}")
        for i, x in enumerate(ranked)
    ]
    made = {"prompt": sides[0]["prompt"], "ranked": [side["chosen"] for side in sides]}
    return {**made, "margin": _margin(row["margin"], where)} if row.get("margin") is not None else made


def _margin(value: Any, where: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise UserError(f"{where}: margin={value!r} must be a number of at least 0: how much better `chosen` is")
    return float(value)


def encode_ranked(tokenizer: Tokenizer, rows: Iterable[Any], length: int) -> tuple[dict[str, Any], pack.Report]:
    """({"ranked": sequence record [n, k, length], "valid": bool [n, k]}, report) of raw or normalised rows; `margin` [n] too.

    k is the longest ranking; the mask is as in `encode_pairs`. A completion that keeps no trained token within `length` is
    left out of its ranking, a ranking of fewer than two out of the data: both are counted.
    """
    rows = [normalise_ranked(row, f"ranking {i + 1}") for i, row in enumerate(rows)]
    encoded = [[_encode(tokenizer, row["prompt"], side) for side in row["ranked"]] for row in rows]
    usable = [[x for x in sides if pack.trained(x, length)] for sides in encoded]
    kept = [i for i, sides in enumerate(usable) if len(sides) > 1]
    flat, report = pack.pad([x for i in kept for x in usable[i]], length)
    valid = np.zeros((len(kept), max((len(usable[i]) for i in kept), default=2)), bool)
    for place, i in enumerate(kept):
        valid[place, : len(usable[i])] = True
    record = {name: np.zeros((*valid.shape, length), x.dtype) for name, x in flat.items()}
    for name, x in flat.items():
        record[name][valid] = x
    lost = [i for i in range(len(rows)) if len(usable[i]) < 2]
    every = [x for sides in encoded for x in sides]
    report |= {
        "rows": len(kept), "examples": len(rows), "dropped": len(lost),
        **pack.nothing_trained(lost, lost_side(encoded[lost[0]], length) if lost else None, length),
        "lengths": pack.histogram(np.array([len(x.tokens) for x in every])),
        "truncated": sum(any(len(x.tokens) > length + 1 for x in encoded[i]) for i in kept),
        "completions_left_out": sum(len(encoded[i]) - len(usable[i]) for i in kept),
    }  # fmt: skip
    columns = {"ranked": record, "valid": valid}
    return {**columns, **_margins(rows, kept)}, report


def _encode(tokenizer: Tokenizer, prompt: Any, side: Any) -> Example:
    """Prompt and completion, of which only the completion is trained."""
    before = len(chat.encode_chat(tokenizer, prompt).tokens)
    example = chat.encode_chat(tokenizer, prompt + side)
    example.mask[:before] = False  # the template only appends
    return example


def _margins(rows: list[Ranking], kept: list[int]) -> dict[str, np.ndarray]:
    """{"margin": [n]} when every row is a pair that has one, {} when none has."""
    have = [i for i, row in enumerate(rows) if "margin" in row]
    if not have:
        return {}
    without = next((i for i, row in enumerate(rows) if "margin" not in row or len(row["ranked"]) != 2), None)
    if without is not None:
        raise UserError(
            f"ranking {without + 1} is no pair with a margin, but ranking {have[0] + 1} has one: give `margin` in every row "
            "of pairs, or in none"
        )
    return {"margin": np.array([rows[i]["margin"] for i in kept], np.float32)}


def as_pairs(columns: dict[str, Any]) -> dict[str, Any]:
    """Rankings of two as {chosen, rejected} records, with what else stands in the columns."""
    chosen, rejected = ({name: x[:, side] for name, x in columns["ranked"].items()} for side in (0, 1))
    return {"chosen": chosen, "rejected": rejected} | {n: x for n, x in columns.items() if n not in ("ranked", "valid")}
