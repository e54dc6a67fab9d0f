"""A comparison as text and as one HTML file."""

from __future__ import annotations

import json
import math
import shutil
import textwrap
from collections.abc import Sequence
from html import escape
from typing import Any

from experiments.compare.paired import Test
from experiments.compare.record import Record, config_differences, final, provenance, shared_metrics, short_names
from experiments.compare.verdict import conclusion, notes
from jaxllm.report import figures
from jaxllm.report.html import document


def number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def metric_rows(records: list[Record]) -> list[list[str]]:
    """A row for each shared metric: the value of each run, and of two runs the difference."""
    rows = []
    for name in shared_metrics(records):
        values = [final(r, name) for r in records]
        difference = [f"{values[1] - values[0]:+.3g}"] if len(records) == 2 else []
        rows.append([name, *(f"{v:.4g}" for v in values), *difference])
    return rows


def test_rows(tests: Sequence[Test]) -> list[list[str]]:
    rows = []
    for t in tests:
        mean, low, high, _ = t.difference
        known = "-" if math.isnan(low) else f"{low:.3g} to {high:.3g}"
        ps = ("-" if math.isnan(p) else f"{p:.2g}" for p in (t.p, t.adjusted))
        rows.append([t.name, f"{mean:+.3g}", known, *ps, t.over])
    return rows


def tables(records: list[Record], tests: Sequence[Test]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, head, rows) of all tables."""
    names = short_names(records)
    settings = [[key, *map(number, values)] for key, values in config_differences(records).items()]
    origin = [[key, *values] for key, values in provenance(records).items()]
    last = ["second - first"] if len(records) == 2 else []
    return [
        ("Settings that differ", ["setting", *names], settings),
        ("At the end", ["metric", *names, *last], metric_rows(records)),
        ("Paired differences", ["metric", "second - first", "95 % interval", "p", "p by Holm", "over"], test_rows(tests)),
        ("Where they come from", ["", *names], origin),
    ]


def aligned(head: list[str], rows: list[list[str]], width: int) -> list[str]:
    """Columns under their heads; cells are cut so that a line fits."""
    n = len(head)
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(n)]
    while sum(widths) + 2 * n > width and max(widths) > 8:
        widths[widths.index(max(widths))] -= 1
    cut = lambda text, size: text if len(text) <= size else text[: size - 1] + "…"  # noqa: E731
    return ["  " + "  ".join(cut(c, w).ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]]


def text(records: list[Record], tests: Sequence[Test], width: int = 0) -> list[str]:
    """The comparison in lines."""
    width = width or min(shutil.get_terminal_size().columns, 120)
    lines = []
    for title, head, rows in tables(records, tests):
        if rows:
            lines += [title, *aligned(head, rows, width), ""]
    for said in [*notes(records), *conclusion(records, list(tests))]:
        lines += textwrap.wrap(said, width)
    return lines


def curves(records: list[Record]) -> str:
    """A figure for each metric that two runs or more have logged twice, and that is not one number throughout."""
    names = short_names(records)
    plots = []
    for metric in shared_metrics(records):
        lines = {n: r.series[metric] for n, r in zip(names, records, strict=True) if len(r.series.get(metric, ((), ()))[0]) > 1}
        if len(lines) > 1 and not figures.constant([ys for _, ys in lines.values()]):
            plots.append(figures.line_plot(lines, metric))
    return f'<h3>Curves</h3><div class="plots">{"".join(plots)}</div>' if plots else ""


def _cells(row: list[str]) -> str:
    return "".join(f'<td class="n">{escape(cell)}</td>' for cell in row)


def page(records: list[Record], tests: Sequence[Test]) -> str:
    """The comparison as a file without scripts or links."""
    title = escape(" · ".join(short_names(records)))
    said = "".join(f"<li>{escape(line)}</li>" for line in [*conclusion(records, list(tests)), *notes(records)])
    parts = [f"<h1>{title}</h1><ul>{said}</ul>"]
    for name, head, rows in tables(records, tests):
        if rows:
            top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
            body = "".join(f"<tr><td>{escape(row[0])}</td>{_cells(row[1:])}</tr>" for row in rows)
            parts.append(f"<h3>{escape(name)}</h3><div class='wide'><table><tr>{top}</tr>{body}</table></div>")
    parts.insert(2 if config_differences(records) else 1, curves(records))
    return document(f"compare {' · '.join(short_names(records))}", "".join(parts), kind="compare")
