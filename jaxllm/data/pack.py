"""Examples into rows of one length: packed with segment ids, or one a row. What is cut or left out counts.

The shift between inputs and targets is made here, once: an example of m tokens takes m - 1 positions.
A sequence record is a dict of [rows, length] arrays: tokens and targets int32 (0 in padding), segments int32
(0 is padding, 1.. the example in the row), mask bool (True where the target is trained).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxllm.core.types import UserError
from jaxllm.data.chat import Example, spelled
from jaxllm.data.tokenizer import Tokenizer

CHUNK = 4096  # examples that are written at a time: bounds the memory of the index arrays
MOST_UNTRAINED = 0.05

Record = dict[str, np.ndarray]
Report = dict[str, Any]


def pack(examples: Sequence[Example], length: int, *, window: int = 1024) -> tuple[Record, Report]:
    """First-fit inside windows of `window` examples in the given order; no example is split.

    (sequence record [rows, length], report). Longer examples are cut to length + 1 tokens and counted;
    examples of fewer than 2 tokens train nothing, are left out and counted.
    """
    kept, report = _fit(examples, length)
    return _write(kept, _first_fit(_positions(kept), length, window), length, report)


def pad(examples: Sequence[Example], length: int) -> tuple[Record, Report]:
    """One example a row, cut and counted as in `pack`: (sequence record [rows, length], report)."""
    kept, report = _fit(examples, length)
    zero = np.zeros(len(kept), np.int64)
    return _write(kept, (np.arange(len(kept)), zero, zero + 1), length, report)


def split_long(example: Example, length: int) -> list[Example]:
    """Pieces of at most length + 1 tokens that overlap by one, so that every target is trained once."""
    _check_length(length)
    last = len(example.tokens) - 1
    if last <= length:
        return [example]
    pieces = [slice(start, start + length + 1) for start in range(0, last, length)]
    return [Example(example.tokens[p], example.mask[p]) for p in pieces]


def check_report(report: Report, where: str, tokenizer: Tokenizer | None = None) -> None:
    """UserError when there is no row, or when more than 5 % of the examples have no trained token, one of which is shown."""
    given, untrained = report["examples"], report["untrained"]
    if untrained > MOST_UNTRAINED * given:
        first = f"number {report['first_untrained'] + 1}"
        if tokenizer is not None:
            first = repr(spelled(tokenizer, report["untrained_tokens"])[:80])
        raise UserError(
            f"{where}: {untrained} of {given} examples have no trained token (the first is {first}): their answers are missing "
            "or lie beyond config.data.length; raise it or remove those rows"
        )
    if not report["rows"]:
        why = f"all {given} examples have fewer than 2 tokens" if given else "there are no examples"
        raise UserError(f"{where}: nothing to train on, {why}")


def nothing_trained(lost: Sequence[int], first: Example | None, length: int) -> Report:
    """A report's counts of examples without a trained token: their indices, and the first of them."""
    shown = [] if first is None else first.tokens[: length + 1].tolist()
    return {"untrained": len(lost), "first_untrained": lost[0] if lost else None, "untrained_tokens": shown}


def histogram(lengths: np.ndarray) -> dict[str, int]:
    """How many examples have at most 8, 16, 32, ... tokens and more than the bound before."""
    if not len(lengths):
        return {}
    power = np.maximum(np.ceil(np.log2(np.maximum(lengths, 1))).astype(int), 3)
    counts = np.bincount(power)
    return {f"<={2**p}": int(counts[p]) for p in range(power.min(), len(counts))}


def trained(example: Example, length: int) -> bool:
    """Whether a target is trained within `length` positions."""
    return bool(example.mask[1 : length + 1].any())


def _check_length(length: int) -> None:
    if length < 1:
        raise UserError(f"config.data.length={length} must be at least 1")


def _fit(examples: Sequence[Example], length: int) -> tuple[list[Example], Report]:
    """The examples that fit and train something, and the report's counts so far."""
    _check_length(length)
    lengths = np.fromiter((len(e.tokens) for e in examples), np.int64, len(examples))
    kept = [
        e if m <= length + 1 else Example(e.tokens[: length + 1], e.mask[: length + 1])
        for e, m in zip(examples, lengths.tolist(), strict=True)
        if m >= 2
    ]
    untrained = [i for i, e in enumerate(examples) if len(e.tokens) >= 2 and not trained(e, length)]
    return kept, {
        "examples": len(examples),
        "truncated": int((lengths > length + 1).sum()),
        "dropped": len(examples) - len(kept),
        **nothing_trained(untrained, examples[untrained[0]] if untrained else None, length),
        "lengths": histogram(lengths),
    }


def _positions(examples: Sequence[Example]) -> np.ndarray:
    return np.fromiter((len(e.tokens) - 1 for e in examples), np.int64, len(examples))


def _first_fit(sizes: np.ndarray, length: int, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, offset, segment) of every example: the first row of its window that has room."""
    row, offset, segment = (np.empty(len(sizes), np.int64) for _ in range(3))
    rows = 0
    for start in range(0, len(sizes), window):
        part = sizes[start : start + window]
        room = np.full(len(part), length)  # a row for each example: unused ones have room for anything
        count = [0] * len(part)
        for i, size in enumerate(part.tolist(), start):
            r = int((room >= size).argmax())
            row[i], offset[i] = rows + r, length - room[r]
            room[r] -= size
            count[r] += 1
            segment[i] = count[r]
        rows += int((room < length).sum())
    return row, offset, segment


def _write(
    examples: list[Example], places: tuple[np.ndarray, ...], length: int, report: Report
) -> tuple[Record, Report]:
    """The record with every example at its (row, offset, segment), and the finished report."""
    row, offset, segment = places
    rows = int(row.max()) + 1 if len(row) else 0
    flat = {name: np.zeros(rows * length, np.int32) for name in ("tokens", "targets", "segments")}
    flat["mask"] = np.zeros(rows * length, bool)
    for start in range(0, len(examples), CHUNK):
        part = slice(start, start + CHUNK)
        _write_chunk(flat, examples[part], row[part] * length + offset[part], segment[part])
    used = int(np.count_nonzero(flat["segments"]))
    counts = {"rows": rows, "tokens": used, "trained_tokens": int(flat["mask"].sum())}
    record = {name: x.reshape(rows, length) for name, x in flat.items()}
    return record, {**report, **counts, "fill": used / max(1, rows * length)}


def _write_chunk(flat: Record, examples: list[Example], begin: np.ndarray, segment: np.ndarray) -> None:
    """Write examples at flat positions `begin`, all at once: targets are the tokens one further on."""
    sizes = _positions(examples)
    tokens = np.concatenate([e.tokens for e in examples])
    mask = np.concatenate([e.mask for e in examples])
    ends = np.cumsum(sizes)
    within = np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)
    # an example has one token more than positions, so the k-th begins k further on among the tokens
    source = np.arange(ends[-1]) + np.repeat(np.arange(len(sizes)), sizes)
    place = within + np.repeat(begin, sizes)
    flat["tokens"][place] = tokens[source]
    flat["targets"][place] = tokens[source + 1]
    flat["mask"][place] = mask[source + 1]
    flat["segments"][place] = np.repeat(segment, sizes)
