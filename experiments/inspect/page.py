"""The view as one HTML file without scripts or links: hovering over a token shows what training knows of it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from experiments.inspect.rows import View
from experiments.inspect.text import on_loss, visible
from experiments.inspect.tokens import IMAGE, Part, Shown, Token, cut
from jaxllm.report import figures
from jaxllm.report.html import document

ROLES = ("system", "user", "assistant", "tool", "image", "text")
LONGEST = 4000  # tokens of a part; of longer ones both ends are shown
MOST = 40_000  # tokens of a view: a browser is to open what is written, about 5 MB
OWN = """
.tokens { font: 13.5px/2 ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; white-space: pre-wrap;
  margin: 4px 0 10px; }
.tokens span, .seg { unicode-bidi: isolate; }
.tokens span { border-radius: 3px; padding: 2px 0; box-shadow: inset 1px 0 0 #fff; }
.system { background: #f3e8ff; } .user { background: #dbeafe; } .assistant { background: #dcfce7; } .tool { background: #cffafe; }
.image { background: #ffedd5; } .text { background: #f3f4f6; }
.t { border-bottom: 3px solid #15803d; font-weight: 600; } .down { border-bottom: 3px dotted #b91c1c; }
.seg { color: #6b7280; font-size: 11px; margin: 0 3px 0 7px; } .pad { color: #6b7280; font-style: italic; white-space: nowrap; }
.row { border: 1px solid #e5e7eb; border-radius: 8px; padding: 8px 14px; margin: 12px 0; }
.row h3 { margin: 4px 0; } .part { color: #6b7280; font-size: 13px; margin: 6px 0 0; overflow-wrap: anywhere; }
.row img { image-rendering: pixelated; border-radius: 4px; margin-top: 6px; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(380px, 100%), 1fr)); gap: 0 22px; }
.legend { font-size: 13px; line-height: 2; } .legend span { border-radius: 3px; padding: 0 8px; margin-right: 8px;
  display: inline-block; }
"""


def role_of(token: Token) -> str:
    return token.role if token.role in ROLES else "text"


def token_span(token: Token) -> str:
    """One token; its title says id, role, segment, position and weight."""
    facts = [f"id {token.id}"] if token.id != IMAGE else []
    facts += [token.role, f"segment {token.segment}", f"position {token.position}", f"weight {token.weight:.4g}"]
    title = escape(" · ".join(facts + [token.note] * bool(token.note)), quote=True)
    trained = "" if not token.weight else " t down" if token.note.startswith("advantage -") else " t"
    shown = escape(visible(token.text)).replace("⏎", "⏎\n")
    return f'<span class="{role_of(token)}{trained}" title="{title}">{shown}</span>'


def part_div(part: Part) -> str:
    """A part: what it is, and its tokens; a number stands before each segment where there are several."""
    several = len({t.segment for t in part.tokens}) > 1
    spans, last = [], None
    first, left_out, rest = cut(part.tokens, LONGEST)
    for tokens in (first, rest):
        for token in tokens:
            if several and token.segment != last:
                spans.append(f'<i class="seg">{token.segment}</i>')
            last = token.segment
            spans.append(token_span(token))
        if tokens is first and left_out:
            spans.append(f'\n<i class="pad">{left_out:,} tokens are not shown</i>\n')
    if part.padding:
        spans.append(f' <i class="pad" title="padding: segment 0, weight 0">{part.padding:,} padding</i>')
    said = " · ".join(filter(None, (part.name, part.size, part.facts)))
    files = (base64.b64encode(picture).decode() for picture in part.pictures)
    images = "".join(f'<img alt="image {i + 1}" src="data:image/png;base64,{file}">' for i, file in enumerate(files))
    return f'<div><p class="part">{escape(said)}</p>{images}<div class="tokens">{"".join(spans)}</div></div>'


def lengths_svg(view: View) -> str:
    """The histogram of lengths."""
    counts = view.report.get("lengths", {})
    if not counts:
        return ""
    svg = figures.bar_plot(list(counts), list(counts.values()), "Lengths in tokens", view.report.get("of", "examples"))
    return f'<div class="plots main">{svg}</div>'


def counts_line(view: View) -> str:
    names = ("examples", "rows", "truncated", "dropped", "untrained", "identical")
    return ", ".join(f"{name} {view.report[name]:,}" for name in names if name in view.report)


def legend(view: View) -> str:
    """What colours, lines and numbers mean, of those that this view has."""
    parts = [part for row in view.rows for part in row.parts]
    roles = dict.fromkeys(role_of(t) for part in parts for t in part.tokens)
    marks = "".join(f'<span class="{role}">{role}</span>' for role in roles)
    marks += '<span class="t">trained</span>' if any(t.weight for part in parts for t in part.tokens) else ""
    if any(t.note.startswith("advantage -") for part in parts for t in part.tokens):
        marks += '<span class="t down">trained to be less likely</span>'
    several = any(len({t.segment for t in part.tokens}) > 1 for part in parts)
    number = "a small number begins the segment of that number; " if several else ""
    return f'<p class="legend">{marks}{number}hover over a token for its id, role, segment, position and weight in the loss</p>'


def row_div(row: Shown) -> str:
    answer = f'<p class="part">reference answer: {escape(visible(row.answer))}</p>' if row.answer else ""
    sides = "sides" if len(row.parts) == 2 else ""
    body = "".join(map(part_div, row.parts))
    return f'<div class="row"><h3>{escape(visible(row.title))}</h3><div class="{sides}">{body}</div>{answer}</div>'


def fitting(rows: Sequence[Shown]) -> Sequence[Shown]:
    """The first rows that hold MOST tokens together, at least one."""
    size = 0
    for i, row in enumerate(rows):
        size += sum(min(len(part.tokens), LONGEST) for part in row.parts)
        if size > MOST and i:
            return rows[:i]
    return rows


def section(view: View) -> str:
    """A view: what its loss is on, its lengths, and its rows."""
    title = escape(visible(f"{view.experiment} on {view.where}"))
    notes = "".join(f"<li>{escape(visible(note))}</li>" for note in view.notes)
    rows = fitting(view.rows)
    less = f'<p class="sub">{len(view.rows) - len(rows):,} more rows are not shown: ask for fewer with --rows</p>'
    return (
        f'<h1>{title}</h1><p class="sub">{escape(visible(on_loss(view)))}</p><ul>{notes}</ul>'
        f'<p class="sub">{escape(counts_line(view))}</p>{lengths_svg(view)}'
        f"<h2>First in the order of training</h2>{legend(view)}{''.join(map(row_div, rows))}{less * (len(rows) < len(view.rows))}"
    )


def page(views: Sequence[View]) -> str:
    """The whole file: a view, or those of a run's stages."""
    title = " · ".join(f"{view.experiment} on {view.where}" for view in views)
    return document(visible(title), "\n".join(map(section, views)), OWN, "inspect")
