"""The view as one HTML file without scripts or links: hovering over a token shows what training knows of it."""

from __future__ import annotations

from html import escape

from experiments.inspect.rows import View
from experiments.inspect.text import on_loss, visible
from experiments.inspect.tokens import Part, Token
from jaxllm.report import figures
from jaxllm.report.html import STYLE

COLOURS = {"system": "#f3e8ff", "user": "#dbeafe", "assistant": "#dcfce7", "tool": "#cffafe", "text": "#f3f4f6"}
OWN = """
.tokens { font: 13.5px/2 ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; white-space: pre-wrap;
  margin: 4px 0 10px; }
.tokens span { border-radius: 3px; padding: 2px 0; box-shadow: inset 1px 0 0 #fff; }
.t { border-bottom: 3px solid #15803d; font-weight: 600; } .down { border-bottom-color: #b91c1c; }
.seg { color: #6b7280; font-size: 11px; margin: 0 3px 0 7px; } .pad { color: #9ca3af; font-style: italic; white-space: nowrap; }
.row { border: 1px solid #e5e7eb; border-radius: 8px; padding: 8px 14px; margin: 12px 0; }
.row h3 { margin: 4px 0; } .part { color: #6b7280; font-size: 13px; margin: 6px 0 0; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); gap: 0 22px; }
.legend span { border-radius: 3px; padding: 1px 8px; margin-right: 8px; font-size: 13px; }
"""


def token_span(token: Token) -> str:
    """One token; its title says id, role, segment, position and weight."""
    facts = [f"id {token.id}", token.role, f"segment {token.segment}", f"position {token.position}", f"weight {token.weight:.4g}"]
    title = escape(" · ".join(facts + [token.note] * bool(token.note)), quote=True)
    kind = ' class="t down"' if token.weight and token.note.startswith("advantage -") else ' class="t"' if token.weight else ""
    shown = escape(visible(token.text)).replace("⏎", "⏎\n")
    return f'<span{kind} style="background:{COLOURS.get(token.role, COLOURS["text"])}" title="{title}">{shown}</span>'


def part_div(part: Part) -> str:
    """A part: what it is, and its tokens; a number stands before each segment where there are several."""
    several = len({t.segment for t in part.tokens}) > 1
    spans, last = [], None
    for token in part.tokens:
        if several and token.segment != last:
            spans.append(f'<i class="seg">{token.segment}</i>')
        last = token.segment
        spans.append(token_span(token))
    if part.padding:
        spans.append(f' <i class="pad" title="padding: segment 0, weight 0">{part.padding} padding</i>')
    trained = sum(t.weight != 0 for t in part.tokens)
    said = " · ".join(filter(None, (part.name, f"{len(part.tokens)} tokens, {trained} trained", part.facts)))
    return f'<div><p class="part">{escape(said)}</p><div class="tokens">{"".join(spans)}</div></div>'


def lengths_svg(view: View) -> str:
    """The histogram of lengths."""
    counts = view.report.get("lengths", {})
    if not counts:
        return ""
    svg = figures.bar_plot(list(counts), list(counts.values()), "Lengths in tokens", "examples")
    return f'<div class="plots main">{svg}</div>'


def counts_line(view: View) -> str:
    names = ("examples", "rows", "truncated", "dropped", "untrained", "identical")
    return ", ".join(f"{name} {view.report[name]:,}" for name in names if name in view.report)


def page(view: View) -> str:
    """The whole file."""
    title = escape(f"{view.experiment} on {view.where}")
    roles = dict.fromkeys(t.role for row in view.rows for part in row.parts for t in part.tokens)
    legend = "".join(f'<span style="background:{COLOURS.get(role, COLOURS["text"])}">{escape(role)}</span>' for role in roles)
    rows = []
    for row in view.rows:
        answer = f'<p class="part">reference answer: {escape(visible(row.answer))}</p>' if row.answer else ""
        sides = "sides" if len(row.parts) == 2 else ""
        body = "".join(map(part_div, row.parts))
        rows.append(f'<div class="row"><h3>{escape(row.title)}</h3><div class="{sides}">{body}</div>{answer}</div>')
    notes = "".join(f"<li>{escape(visible(note))}</li>" for note in view.notes)
    body = (
        f'<h1>{title}</h1><p class="sub">{escape(on_loss(view))}</p><ul>{notes}</ul>'
        f'<p class="sub">{escape(counts_line(view))}</p>{lengths_svg(view)}'
        f'<h2>First in the order of training</h2><p class="legend">{legend}'
        '<span class="t">trained</span></p>' + "".join(rows)
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}{OWN}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )
