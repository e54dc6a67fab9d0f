"""What notebooks show: curves of a run, plots side by side, tables, tokens as boxes. All of it as HTML text."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxllm.report import figures
from jaxllm.report.files import read_jsonl

SHADES = ("#dbeafe", "#fef3c7")


def curves(workdir: Path | str, *names: str, ylabel: str = "", against: str = "step") -> str:
    """A plot of a run's logged metrics over its steps, or against another metric."""
    rows = [row for row in read_jsonl(Path(workdir) / "metrics.jsonl") if row.get(against) is not None]
    found = {name: [row for row in rows if row.get(name) is not None] for name in names}
    series = {name: ([r[against] for r in some], [r[name] for r in some]) for name, some in found.items()}
    return figures.line_plot(series, Path(workdir).name, against, ylabel, width=430)


def row(*plots: str) -> str:
    """Plots side by side."""
    return '<div style="display:flex;flex-wrap:wrap;gap:8px">' + "".join(plots) + "</div>"


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A table; every cell is text, whatever a model wrote into it."""
    cell = "<td style='text-align:left;white-space:pre-wrap'>{}</td>".format
    text = [[f"{value:.3g}" if isinstance(value, float) else str(value) for value in line] for line in (head, *rows)]
    lines = ["".join(cell(html.escape(value)) for value in line) for line in text]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def boxes(tokenizer: Any, tokens: Iterable[int], trained: Sequence[bool] | None = None) -> str:
    """Tokens as boxes; where `trained` is given, green ones are the targets that the loss counts."""
    style = "color:#111;white-space:pre;margin:1px;padding:1px 3px;background:"
    spans = []
    for i, token in enumerate(tokens):
        shade = SHADES[i % 2] if trained is None else "#86efac" if trained[i] else "#e5e7eb"
        spans.append(f'<span style="{style}{shade}">{html.escape(tokenizer.piece(int(token)))}</span>')
    return '<div style="line-height:1.9;font-family:monospace">' + "".join(spans) + "</div>"
