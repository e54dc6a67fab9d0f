"""Checks of the columns: what is trained, where it ends, and that ids and targets are what they should be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from experiments import common, reading
from experiments.doctor.capture import Seen
from experiments.doctor.verdict import Verdict, absent, at_most
from jaxllm.core.types import UserError
from jaxllm.data import chat
from jaxllm.report import diagnosis

CHATS = ("sft", "dpo", "kto", "reward", "ppo", "grpo", "pairs", "best_of_n")
LEAST = {"rows trained": 0.05}  # a share that may train nothing
Record = dict[str, np.ndarray]


def records(columns: Any, name: str = "") -> list[tuple[str, Record]]:
    """Every sequence record of nested columns with its name, its arrays flattened to [rows, length]."""
    if not isinstance(columns, dict):
        return []
    found = [pair for key, x in columns.items() for pair in records(x, f"{name}/{key}".strip("/"))]
    if {"tokens", "targets", "segments", "mask"} <= columns.keys():
        kept = ("tokens", "targets", "segments", "mask")
        flat = {n: np.asarray(columns[n]).reshape(-1, columns[n].shape[-1]) for n in kept}
        found.append((name or "rows", flat))
    return found


def joined(seen: Seen) -> Record | None:
    """All records of the columns one below the other; None where the columns have none (prompts, masked tokens, labels)."""
    found = [r for _, r in records(seen.fit["columns"])]
    if not found:
        return None
    width = max(r["tokens"].shape[1] for r in found)
    wide = [{n: np.pad(x, ((0, 0), (0, width - x.shape[1]))) for n, x in r.items()} for r in found]
    stacked = {n: np.concatenate([r[n] for r in wide]) for n in wide[0]}
    used = stacked["segments"].any(axis=1)  # the places of a ranking that hold no completion
    return {n: x[used] for n, x in stacked.items()}


def on_record(name: str, check: Callable[[Seen, Record], Verdict]) -> Callable[[Seen], Verdict]:
    """A check of the records as a check of what was seen."""

    def whole(seen: Seen) -> Verdict:
        record = joined(seen)
        return absent(name, "the columns have no targets yet") if record is None else check(seen, record)

    return whole


def ids_in_range(seen: Seen) -> Verdict:
    size = seen.fit["model"].config.vocab_size
    try:
        common.check_columns(seen.fit["columns"], size)
    except UserError as error:
        return Verdict("ids in range", None, None, False, str(error), "the rows are of another tokenizer than the model's")
    return Verdict("ids in range", None, None, True, f"every id is below {size:,}")


def targets_shifted(seen: Seen, r: Record) -> Verdict:
    inside = (r["segments"][:, 1:] == r["segments"][:, :-1]) & (r["segments"][:, 1:] != 0)
    wrong = inside & (r["targets"][:, :-1] != r["tokens"][:, 1:])
    said = f"{int(inside.sum()):,} targets are the token one further on"
    return at_most("targets shifted", wrong.sum() / max(1, inside.sum()), 0, said, "shift targets by one where rows are made")


def rows_trained(seen: Seen, r: Record) -> Verdict:
    empty = ~r["mask"].any(axis=1)
    said = f"{int(empty.sum())} of {len(empty)} rows have no trained token"
    do = "answers are missing, or lie beyond config.data.length: raise it, or remove those rows"
    return at_most("rows trained", empty.mean(), LEAST["rows trained"], said, do)


def padding_untrained(seen: Seen, r: Record) -> Verdict:
    wrong = r["mask"] & (r["segments"] == 0)
    said = f"{r['mask'].mean():.1%} of all places are trained, {(r['segments'] == 0).mean():.1%} are padding"
    return at_most("padding untrained", wrong.sum(), 0, said, "make the mask from lengths, and shift it with the targets")


def last_targets(r: Record) -> tuple[np.ndarray, np.ndarray]:
    """(row, place) of the last target of every segment."""
    after = np.pad(r["segments"][:, 1:], ((0, 0), (0, 1)))
    return np.nonzero((r["segments"] != 0) & (after != r["segments"]))


def lengths(r: Record) -> np.ndarray:
    """Places of every example."""
    row, segment = np.arange(len(r["segments"]))[:, None] * (r["segments"].max() + 1), r["segments"]
    return np.unique((row + segment)[segment != 0], return_counts=True)[1]


def end_trained(seen: Seen, r: Record) -> Verdict:
    stops = chat.stop_ids(seen.fit["tokenizer"])
    at = last_targets(r)
    ends = np.isin(r["targets"][at], stops)
    said = f"{int(ends.sum()):,} of {len(ends):,} examples end in an end token"
    do = "mask by lengths, not by token ids: the end needs a label"
    if ends.any():
        return at_most("end trained", (ends & ~r["mask"][at]).sum() / ends.sum(), 0, said, do)
    if seen.experiment not in CHATS:
        return absent("end trained", "no example ends in an end token")
    do = "the template writes no end token behind an answer, or every answer is cut: samples would never stop"
    return Verdict("end trained", 1.0, 0.0, False, said, do)


def one_start(seen: Seen, r: Record) -> Verdict:
    specials = seen.fit["tokenizer"].specials
    start = specials.get("bos", specials.get("eos"))
    twice = (r["tokens"][:, 1:] == start) & (r["tokens"][:, :-1] == start) & (r["segments"][:, 1:] == r["segments"][:, :-1])
    twice &= r["segments"][:, 1:] != 0
    said = "no example begins with two start tokens" if not twice.any() else f"{int(twice.sum())} places have two in a row"
    do = "the template writes a start token and the tokenizer adds one: encode rendered text without special tokens"
    return at_most("one start token", twice.sum(), 0, said, do)


def truncated(seen: Seen) -> Verdict:
    counts = diagnosis.examples_cut(seen.fit["run"].workdir)
    if not counts:
        return absent("truncated", "rows are of one length, or a row that is too long ends the run")
    share, what = max((cut / max(1, of), what) for what, (cut, of) in counts.items())
    said, record = f"share of {what}", joined(seen)
    if record is not None:
        middle, most = np.percentile(lengths(record), (50, 95))
        said += f"; examples of {middle:.0f} tokens in the median, {most:.0f} at the 95th percentile"
    do = "raise config.data.length, or shorten the rows: a cut answer has lost its end"
    return at_most("truncated", share, reading.MOST_CUT, said, do)


CHECKS = {
    "ids in range": ids_in_range, "truncated": truncated,
    **{name: on_record(name, check) for name, check in {
        "targets shifted": targets_shifted, "rows trained": rows_trained, "padding untrained": padding_untrained,
        "end trained": end_trained, "one start token": one_start,
    }.items()},
}  # fmt: skip
