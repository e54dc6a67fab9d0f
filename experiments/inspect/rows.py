"""The rows that training sees first, as tokens, and what the loss is on."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import common
from experiments.inspect.data import Data
from experiments.inspect.roles import with_roles
from experiments.inspect.tokens import Part, Shown, corrupted, given, sequence, with_images
from jaxllm.core.types import UserError
from jaxllm.data import images
from jaxllm.data.loader import make_loader
from jaxllm.worlds.images import palette


class View(NamedTuple):
    """All that is shown: rows; trained of so many positions; example: a trained stretch; report: counts and lengths."""

    experiment: str
    where: str
    notes: list[str]
    rows: list[Shown]
    trained: int
    positions: int
    example: str
    report: dict[str, Any]


SIDES = ("chosen", "rejected", "completion")  # of pairs and labelled rows; KTO's mismatched side only estimates the KL


def first_rows(columns: Any, config: Any, n: int) -> np.ndarray:
    """The indices of the first n rows in the order of training."""
    size = jax.tree.leaves(columns)[0].shape[0]
    batch = min(config.batch_size, size) if "batch_size" in config else size
    loader = make_loader({"i": np.arange(size)}, batch, config.seed)
    n = min(n, size)
    order = [i for step in range(-(-n // batch) + 1) for i in loader.batch(step)["i"].tolist()]
    return np.array(list(dict.fromkeys(order))[:n])


def parts_of(data: Data, row: Any) -> list[Part]:
    """The sequences of a row of columns."""
    t = data.tokenizer
    if "ranked" in row:
        k = int(row["valid"].sum())
        return [sequence(t, {n: x[i] for n, x in row["ranked"].items()}, f"rank {i + 1}") for i in range(k)]
    if "tokens" not in row:
        return [sequence(t, row[side], side) for side in SIDES if side in row]
    if "lengths" in row:
        return [given(t, row["tokens"][: row["lengths"]], "prompt")]
    if "eligible" in row:
        return [corrupted(t, row)]
    if "mask" not in row or "targets" not in row:
        every = np.atleast_2d(row["tokens"])
        return [given(t, ids[seen != 0], "") for ids, seen in zip(every, np.atleast_2d(row["segments"]), strict=True)]
    source = row.get("inputs")
    if not isinstance(source, dict):
        return [sequence(t, row)]
    if "pixels" in source:
        pictures = [images.png(images.grid(palette()[x][None], 1, gap=0, scale=8)) for x in source["pixels"]]
        return [with_images(sequence(t, row), source, row["segments"], pictures)]
    use = source["segments"] != 0
    return [given(t, source["tokens"][use], "input", source["segments"][use]), sequence(t, row, "target")]


def shown(data: Data, index: Any) -> list[Shown]:
    """Rows with their titles and, where there is one, their reference answer or label."""
    rows = []
    for i in map(int, index):
        row = common.take(data.columns, i)
        title, answer = f"row {i + 1}", ""
        if "label" in row and "completion" in row:
            title += ": good" if row["label"] else ": bad"
        if "lengths" in row and len(data.answers):
            answer = data.answers[i]
        elif "label" in row and len(data.answers):
            answer = str(data.answers[int(row["label"])])
        rows.append(Shown(title, parts_of(data, row), answer))
    return _told(data, rows)


def _told(data: Data, rows: list[Shown]) -> list[Shown]:
    """The rows with roles. Conversations are encoded once for all parts of a side, however far apart training takes them."""
    parts = [part for row in rows for part in row.parts]
    for side in dict.fromkeys(map(_side, parts)):
        at = [i for i, part in enumerate(parts) if _side(part) == side]
        told = data.messages.get(side, ())
        named = with_roles([parts[i] for i in at], data.tokenizer, told, data.length, side == "prompt")
        for i, part in zip(at, named, strict=True):
            parts[i] = part
    ready = iter(parts)
    return [row._replace(parts=[next(ready) for _ in row.parts]) for row in rows]


def _side(part: Part) -> str:
    return "ranked" if part.name.startswith("rank ") else part.name


def counts(columns: Any) -> tuple[int, int] | None:
    """(trained, all) positions of columns; None for prompts and for rows whose loss is not on tokens."""
    if "tokens" not in columns:
        own = [columns[side] for side in (*SIDES, "ranked") if side in columns]
        return tuple(map(sum, zip(*(counts(side) for side in own), strict=True)))
    mask = columns.get("chosen", columns.get("mask")) if not {"lengths", "label", "labels"} & set(columns) else None
    return None if mask is None else (int(mask.sum()), int((columns["segments"] != 0).sum()))


def example_of(rows: list[Shown], most: int = 48) -> str:
    """The first stretch of trained tokens."""
    for tokens in (part.tokens for row in rows for part in row.parts):
        first = next((i for i, t in enumerate(tokens) if t.weight), None)
        if first is not None:
            end = next((i for i in range(first, len(tokens)) if not tokens[i].weight), len(tokens))
            text = "".join(t.text for t in tokens[first:end])
            return text if len(text) <= most else text[: most - 1] + "…"
    return ""


def view_of(data: Data, config: Any, experiment: str, notes: list[str], n: int) -> View:
    """The view of data. UserError naming the file when no token is trained."""
    found = counts(data.columns)
    if found is not None and not found[0]:
        why = "answers are missing, or lie beyond config.data.length"
        raise UserError(f"{data.where}: none of its {found[1]:,} tokens is trained: {why}")
    rows = shown(data, first_rows(data.columns, config, n))
    trained, positions = found or (0, 0)
    return View(experiment, data.where, notes, rows, trained, positions, example_of(rows), _lengths(data))


def _lengths(data: Data) -> dict[str, Any]:
    """The report, with lengths of what the loop gets where the data functions do not count them."""
    from jaxllm.data.pack import histogram

    if "lengths" in data.report:
        return data.report
    columns = data.columns
    lengths = columns["lengths"] if "lengths" in columns else (columns["segments"] != 0).sum(axis=-1).reshape(-1)
    return {**data.report, "lengths": histogram(np.asarray(lengths))}
