"""The view on a terminal: a block for each role's stretch of tokens, at any width, with colours or with signs alone."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TextIO

from experiments.inspect.rows import View
from experiments.inspect.tokens import Part, Token, cut
from jaxllm.report.console import bar, can_draw, is_terminal

CODES = {"system": "35", "user": "34", "assistant": "32", "tool": "36", "image": "33", "text": "39"}
NAMED = {"\n": "⏎", "\t": "→"}
GUTTER = 15
LONGEST = 2000  # tokens of a part; of longer ones both ends are shown


class Look(NamedTuple):
    """What a stream shows: columns, colours, and whether more than ASCII."""

    width: int
    coloured: bool = False
    unicode: bool = True

    @property
    def marks(self) -> tuple[str, str]:
        """What stands around trained tokens where there are no colours."""
        return ("▸", "◂") if self.unicode else ("[[", "]]")


def visible(text: str, unicode: bool = True) -> str:
    """Text in which every control character is written out: nothing in the data can steer the terminal, or turn a line around."""
    named = NAMED if unicode else {}
    plain = lambda c: c.isprintable() and (unicode or c.isascii())  # noqa: E731
    return "".join(named.get(c) or (c if plain(c) else c.encode("unicode_escape").decode()) for c in text)


def folded(text: str, look: Look) -> list[str]:
    """A line as lines that fit."""
    counted = "".join(c + "\0" * (columns(c) - 1) for c in visible(text, look.unicode))  # a wide character counts for two
    return [line.replace("\0", "") for line in textwrap.wrap(counted, look.width, subsequent_indent="    ")] or [""]


def columns(text: str) -> int:
    """The columns that a text takes; CJK characters take two, combining ones none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def cells(tokens: Sequence[Token], look: Look) -> Iterator[tuple[str, str]]:
    """(text, ANSI code) of tokens; without colours, trained stretches stand between two marks."""
    inside, coloured = False, look.coloured
    for token in tokens:
        trained = bool(token.weight)
        text = visible(token.text, look.unicode)
        if not coloured and trained != inside:
            text, inside = (look.marks[0] if trained else look.marks[1]) + text, trained
        yield text, (f"1;4;{CODES.get(token.role, '39')}" if trained else CODES.get(token.role, "39")) if coloured else ""
    if inside:
        yield look.marks[1], ""


def wrapped(pieces: Iterator[tuple[str, str]], width: int) -> list[str]:
    """Lines of at most `width` columns; a piece is cut only where it is longer than a line."""
    lines, line, used = [], "", 0
    for text, code in pieces:
        n = width if columns(text) <= len(text) else width // 2
        for part in [text[i : i + n] for i in range(0, len(text), n)] or [""]:
            size = columns(part)
            if used and used + size > width:
                lines, line, used = [*lines, line], "", 0
            line += f"\x1b[{code}m{part}\x1b[0m" if code else part
            used += size
    return [*lines, line] if line else lines


def stretches(tokens: Sequence[Token]) -> Iterator[list[Token]]:
    """Neighbours of one segment and role."""
    run: list[Token] = []
    for token in tokens:
        if run and (token.segment, token.role) != (run[-1].segment, run[-1].role):
            yield run
            run = []
        run.append(token)
    if run:
        yield run


def part_lines(part: Part, look: Look) -> list[str]:
    """A part: a gutter with segment and role, and its tokens."""
    several = len({t.segment for t in part.tokens}) > 1
    said = part.size + f", {part.padding:,} padding" * bool(part.padding)
    lines = folded("  " + ", ".join(filter(None, (f"{part.name or 'tokens'}: {said}", part.facts))), look)
    first, left_out, last = cut(part.tokens, LONGEST)
    for tokens in (first, last):
        for run in stretches(tokens):
            head = f"{run[0].segment:>4} {run[0].role}" if several else f"     {run[0].role}"
            for i, line in enumerate(wrapped(cells(run, look), max(20, look.width - GUTTER))):
                lines.append((head if i == 0 else "").ljust(GUTTER) + line)
        if tokens is first and left_out:
            lines.append(" " * GUTTER + f"({left_out:,} tokens are not shown)")
    return lines


def on_loss(view: View, marks: tuple[str, str] = Look(0).marks) -> str:
    """In one line what the loss is on."""
    if view.experiment == "classify":
        return "the loss is on the labels of rows, not on their tokens"
    if not view.positions:
        return "no token of these rows is trained: they are read, and what is sampled or chosen after them is"
    return f"trained on {view.trained:,} of {view.positions:,} tokens: {marks[0]}{view.example}{marks[1]}"


def histogram_lines(report: dict[str, Any], look: Look) -> list[str]:
    """A bar for each bucket of lengths."""
    counts = report.get("lengths", {})
    most = max(counts.values(), default=0)
    if not most:
        return []
    room = max(1, min(40, look.width - 24))
    bars = [f"  {name:>8} {bar(n / most, room, unicode=look.unicode).rstrip('░.')} {n:,}" for name, n in counts.items()]
    cut = [f"{report[name]:,} {name}" for name in ("truncated", "dropped", "untrained") if name in report]
    what = f"lengths in tokens of {sum(counts.values()):,} {report.get('of', 'examples')}"
    return [*folded(", ".join([what, *cut]), look), *bars]


def show(view: View, stream: TextIO | None = None, width: int = 0) -> list[str]:
    """The lines of a view for a stream."""
    stream = stream or sys.stdout
    coloured = is_terminal(stream) and not os.environ.get("NO_COLOR")
    look = Look(width or min(shutil.get_terminal_size().columns, 120), coloured, can_draw(stream))
    between = f"trained tokens stand between {look.marks[0]} and {look.marks[1]}"
    legend = "trained tokens are bold and underlined" if coloured else between
    said = [f"{view.experiment} on {view.where}", *view.notes, on_loss(view, look.marks)]
    lines = [line for text in said for line in folded(text, look)] + ["", *histogram_lines(view.report, look), ""]
    lines += folded(f"First in the order of training; {legend}.", look)
    for row in view.rows:
        lines += ["", *folded(row.title, look), *(line for part in row.parts for line in part_lines(part, look))]
        lines += folded(f"  reference answer: {row.answer}", look) if row.answer else []
    return lines
