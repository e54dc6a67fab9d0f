"""The view on a terminal: a block for each role's stretch of tokens, at any width, with colours or with signs alone."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Iterator
from typing import Any, TextIO

from experiments.inspect.rows import View
from experiments.inspect.tokens import Part, Token
from jaxllm.report.console import bar, can_draw, is_terminal

CODES = {"system": "35", "user": "34", "assistant": "32", "tool": "36", "text": "39"}
GUTTER = 15


def visible(text: str) -> str:
    """Text in which every control character is written out: nothing in the data can steer the terminal."""
    named = {"\n": "⏎", "\t": "→"}
    return "".join(named.get(c) or (c if c.isprintable() else f"\\x{ord(c):02x}") for c in text)


def folded(text: str, width: int) -> list[str]:
    """A line as lines that fit."""
    return textwrap.wrap(visible(text), width, subsequent_indent="    ") or [""]


def columns(text: str) -> int:
    """The columns that a text takes; CJK characters take two, combining ones none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def cells(tokens: list[Token], coloured: bool, marks: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """(text, ANSI code) of tokens; without colours, trained stretches stand between two marks."""
    inside = False
    for token in tokens:
        trained = bool(token.weight)
        text = visible(token.text)
        if not coloured and trained != inside:
            text, inside = (marks[0] if trained else marks[1]) + text, trained
        yield text, (f"1;4;{CODES.get(token.role, '39')}" if trained else CODES.get(token.role, "39")) if coloured else ""
    if inside:
        yield marks[1], ""


def wrapped(pieces: Iterator[tuple[str, str]], width: int) -> list[str]:
    """Lines of at most `width` columns; a piece is cut only where it is longer than a line."""
    lines, line, used = [], "", 0
    for text, code in pieces:
        for part in [text[i : i + width] for i in range(0, len(text), width)] or [""]:
            size = columns(part)
            if used and used + size > width:
                lines, line, used = [*lines, line], "", 0
            line += f"\x1b[{code}m{part}\x1b[0m" if code else part
            used += size
    return [*lines, line] if line else lines


def stretches(tokens: list[Token]) -> Iterator[list[Token]]:
    """Neighbours of one segment and role."""
    run: list[Token] = []
    for token in tokens:
        if run and (token.segment, token.role) != (run[-1].segment, run[-1].role):
            yield run
            run = []
        run.append(token)
    if run:
        yield run


def part_lines(part: Part, width: int, coloured: bool, marks: tuple[str, str]) -> list[str]:
    """A part: a gutter with segment and role, and its tokens."""
    several = len({t.segment for t in part.tokens}) > 1
    trained = sum(t.weight != 0 for t in part.tokens)
    said = f"{len(part.tokens)} tokens, {trained} trained" + f", {part.padding} padding" * bool(part.padding)
    lines = folded("  " + ", ".join(filter(None, (f"{part.name or 'tokens'}: {said}", part.facts))), width)
    for run in stretches(part.tokens):
        head = f"{run[0].segment:>4} {run[0].role}" if several else f"     {run[0].role}"
        for i, line in enumerate(wrapped(cells(run, coloured, marks), max(20, width - GUTTER))):
            lines.append((head if i == 0 else "").ljust(GUTTER) + line)
    return lines


def on_loss(view: View, marks: tuple[str, str] = ("▸", "◂")) -> str:
    """In one line what the loss is on."""
    if view.experiment == "classify":
        return "the loss is on the labels of rows, not on their tokens"
    if not view.positions:
        return "no token of these rows is trained: they are read, and what is sampled or chosen after them is"
    return f"trained on {view.trained:,} of {view.positions:,} tokens: {marks[0]}{visible(view.example)}{marks[1]}"


def histogram_lines(report: dict[str, Any], width: int, unicode: bool) -> list[str]:
    """A bar for each bucket of lengths."""
    counts = report.get("lengths", {})
    most = max(counts.values(), default=0)
    if not most:
        return []
    room = min(40, width - 24)
    bars = [f"  {name:>8} {bar(n / most, room, unicode=unicode).rstrip('░.')} {n:,}" for name, n in counts.items()]
    cut = [f"{report[name]:,} {name}" for name in ("truncated", "dropped", "untrained") if name in report]
    return [*folded(", ".join([f"lengths in tokens of {sum(counts.values()):,} examples", *cut]), width), *bars]


def show(view: View, stream: TextIO | None = None, width: int = 0) -> list[str]:
    """The lines of a view for a stream."""
    stream = stream or sys.stdout
    coloured = is_terminal(stream) and not os.environ.get("NO_COLOR")
    unicode = can_draw(stream)
    width = width or min(shutil.get_terminal_size().columns, 120)
    marks = ("▸", "◂") if unicode else ("[[", "]]")
    legend = "trained tokens are bold and underlined" if coloured else f"trained tokens stand between {marks[0]} and {marks[1]}"
    said = [f"{view.experiment} on {view.where}", *view.notes, on_loss(view, marks)]
    lines = [line for text in said for line in folded(text, width)] + ["", *histogram_lines(view.report, width, unicode), ""]
    lines += folded(f"First in the order of training; {legend}.", width)
    for row in view.rows:
        lines += ["", visible(row.title), *(line for part in row.parts for line in part_lines(part, width, coloured, marks))]
        lines += folded(f"  reference answer: {row.answer}", width) if row.answer else []
    return lines
