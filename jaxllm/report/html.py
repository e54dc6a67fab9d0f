"""report.html: one file that tells a run at a glance, made from what lies in its directory."""

from __future__ import annotations

import base64
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from jaxllm.core.types import UserError
from jaxllm.report import diagnosis, figures
from jaxllm.report.console import duration, quantity
from jaxllm.report.files import flatten, read_json, read_jsonl, write_atomic
from jaxllm.report.run import bound_text, interval_text

SAMPLES = 12
WARNINGS = 50
ASIDE = {"clip_ratio", "completions", "data", "first", "guard", "pairs"}  # metrics of how it went, no headline
STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #1f2937;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 2px; } h2 { font-size: 20px; margin: 44px 0 8px; padding-top: 14px;
  border-top: 2px solid #e5e7eb; } h3 { font-size: 15px; margin: 26px 0 8px; color: #374151; }
.sub { color: #6b7280; margin: 0 0 16px; overflow-wrap: anywhere; }
nav { margin: 14px 0; } nav a { margin-right: 16px; color: #0072b2; text-decoration: none; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 10px;
  margin: 14px 0; }
.card { border: 1px solid #e5e7eb; border-radius: 8px; padding: 9px 13px; }
.card b { display: block; font-size: 19px; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.card span { color: #6b7280; font-size: 12.5px; overflow-wrap: anywhere; }
.badge { display: inline-block; border-radius: 999px; padding: 2px 12px; font-size: 14px; font-weight: 600; }
.good { background: #dcfce7; color: #166534; } .bad { background: #fee2e2; color: #991b1b; }
.open { background: #f3f4f6; color: #374151; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; color: #6b7280; font-weight: 600; font-size: 12.5px; }
td, th { padding: 5px 10px; border-bottom: 1px solid #eef0f3; vertical-align: top; }
td.n { font-variant-numeric: tabular-nums; white-space: nowrap; } td.mark { width: 30px; font-weight: 700; }
td.mark.yes { color: #15803d; } td.mark.no { color: #b91c1c; } tr.no td { background: #fef5f5; }
td.share { width: 40%; } td.share i { display: block; height: 12px; margin-top: 5px; border-radius: 3px; background: #0072b2; }
.wide { overflow-x: auto; } .wide td.text { min-width: 180px; }
td.text { white-space: pre-wrap; overflow-wrap: anywhere;
  font: 12.5px/1.45 ui-monospace, Menlo, Consolas, monospace; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 14px; }
.plots svg { width: 100%; max-width: 640px; height: auto; } .figures img { max-width: 100%; }
.plots svg, .figures img { border: 1px solid #eef0f3; border-radius: 8px; }
.figures { display: flex; flex-wrap: wrap; gap: 14px; align-items: flex-start; }
.plots.main { grid-template-columns: repeat(auto-fill, minmax(460px, 1fr)); }
@media (max-width: 560px) {
  .plots, .plots.main { grid-template-columns: 1fr; } td, th { padding: 4px 5px; } .wide td.text { min-width: 130px; }
  td:not(.n) { overflow-wrap: anywhere; min-width: 88px; }
}
pre { background: #f6f7f9; border-radius: 8px; padding: 10px 14px; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; }
details { margin: 10px 0; } summary { cursor: pointer; color: #374151; font-weight: 600; font-size: 14px; }
.warn li { color: #92400e; }
"""


def write_report(run_dir: Path | str) -> Path:
    """Write report.html of a run directory, the stages in its sub-directories included; gives its path."""
    run_dir = Path(run_dir)
    stages = stages_of(run_dir)
    body = [_head(run_dir), _nav(stages), *_sections(run_dir)]
    for stage in stages:
        name = escape(stage.name)
        body += [f'<h2 id="{name}">{name} {_badge(stage)}</h2>', *_sections(stage)]
    write_atomic(run_dir / "report.html", document(f"{_experiment(run_dir)} · {run_dir.resolve().name}", "\n".join(body)))
    return run_dir / "report.html"


def document(title: str, body: str, style: str = "", kind: str = "report") -> str:
    """A whole page of `body`, which is HTML; the title is text. Without scripts or links. kind: the class of its main part."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<style>{STYLE}{style}</style></head>\n<body><main class="{kind}">\n{body}\n</main></body></html>\n'
    )


def check_page(out: str, kind: str, tool: str) -> Path:
    """The path of --out. UserError when it cannot be written, or is there and no page of this kind, which `tool` writes."""
    path = Path(out)
    if not path.parent.is_dir():
        raise UserError(f"--out={out}: no directory {path.parent}: make it first")
    if path.exists() and (not path.is_file() or f'<main class="{kind}">' not in path.read_text("utf-8", "replace")):
        raise UserError(f"--out={out} is there and is no page of {tool}: give another name")
    return path


def stages_of(run_dir: Path) -> list[Path]:
    """The sub-directories that are runs themselves, in the order in which they were started."""
    found = [path.parent for path in run_dir.glob("*/config.json")]
    return sorted(found, key=lambda path: (read_json(path / "env.json").get("time", 0.0), path.name))


def read_series(run_dir: Path) -> dict[str, tuple[list[float], list[float]]]:
    """{metric: (steps, values)} of metrics.jsonl."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    for row in read_jsonl(run_dir / "metrics.jsonl"):
        for name, value in row.items():
            if name not in ("step", "t") and isinstance(value, (int, float)):
                steps, values = series.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    return series


# ---- parts of the page


def _experiment(run_dir: Path) -> str:
    return str(read_json(run_dir / "env.json").get("experiment", run_dir.name))


def _badge(run_dir: Path) -> str:
    result = read_json(run_dir / "result.json")
    if not result:
        return '<span class="badge open">not finished</span>'
    claims = result.get("claims", [])
    held = sum(bool(claim["holds"]) for claim in claims)
    if not claims:
        return '<span class="badge open">finished</span>'
    kind = "good" if held == len(claims) else "bad"
    return f'<span class="badge {kind}">{held} of {len(claims)} claims hold</span>'


def _head(run_dir: Path) -> str:
    env = read_json(run_dir / "env.json")
    devices = ", ".join(f"{count} × {kind}" for kind, count in env.get("devices", {}).items())
    versions = env.get("versions", {})
    jax = f"jax {versions['jax']}" if "jax" in versions else ""
    line = " · ".join(str(part) for part in (run_dir, env.get("started"), devices, jax) if part)
    return f'<h1>{escape(_experiment(run_dir))} {_badge(run_dir)}</h1>\n<p class="sub">{escape(line)}</p>'


def _nav(stages: Sequence[Path]) -> str:
    links = (f'<a href="#{escape(stage.name)}">{escape(stage.name)}</a>' for stage in stages)
    return f"<nav>{''.join(links)}</nav>" if stages else ""


def _sections(run_dir: Path) -> list[str]:
    result, series = read_json(run_dir / "result.json"), read_series(run_dir)
    return [
        _cards(run_dir, result.get("metrics", {}), series),
        _claims(result.get("claims", [])),
        _findings(result.get("findings", "")),
        _warnings(run_dir),
        _figures(run_dir),
        _plots(series),
        _times(run_dir, series),
        _samples(run_dir),
        _details(run_dir, result.get("metrics", {}), series),
        _verdicts(run_dir),
        _next(result.get("next", "")),
    ]


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _cards(run_dir: Path, metrics: Mapping[str, Any], series: Mapping[str, Any]) -> str:
    """The headline: how far, how long, how fast, how good."""
    rows = read_jsonl(run_dir / "metrics.jsonl")
    cards = []
    if rows:
        cards.append(("steps", f"{max(row['step'] for row in rows):,}"))
        cards.append(("wall time of training", duration(rows[-1]["t"] - rows[0]["t"])))
    if speed := series.get("perf/tokens_per_second"):
        cards.append(("tokens per second, median", quantity(statistics.median(speed[1]))))
    if mfu := series.get("perf/mfu"):
        cards.append(("MFU, median", f"{statistics.median(mfu[1]):.1%}"))
    cards += [(name, _number(ys[-1])) for name, (_, ys) in series.items() if name == "eval/loss"]
    rank = lambda name: (name.partition("/")[0] in ASIDE, not name.startswith("eval/"))  # noqa: E731
    cards += [(name, _number(metrics[name])) for name in sorted(metrics, key=rank) if isinstance(metrics[name], (int, float))]
    shown = list(dict(cards).items())[:12]  # a metric of the result replaces the logged one of the same name
    divs = [f'<div class="card"><b>{escape(v)}</b><span>{escape(k)}</span></div>' for k, v in shown]
    return f'<div class="cards">{"".join(divs)}</div>' if divs else ""


def _claims(claims: Iterable[Mapping[str, Any]]) -> str:
    rows = []
    for claim in claims:
        kind, mark = ("yes", "✓") if claim["holds"] else ("no", "✗")
        rows.append(
            f'<tr class="{kind}"><td class="mark {kind}">{mark}</td><td>{escape(str(claim["name"]))}</td>'
            f'<td class="n">{escape(_number(claim["value"]) + interval_text(claim))}</td>'
            f'<td class="n">{escape(bound_text(claim))}</td><td>{escape(str(claim.get("kind", "gate")))}</td></tr>'
        )
    head = "<tr><th></th><th>claim</th><th>measured</th><th>bound</th><th></th></tr>"
    return f'<h3>Claims</h3><div class="wide"><table>{head}{"".join(rows)}</table></div>' if rows else ""


def _verdicts(run_dir: Path) -> str:
    """What the metrics say of the run's health, with what to do."""
    found, healthy = diagnosis.of_run(run_dir)
    rows = "".join(
        f'<tr class="{"yes" if v.normal else "no"}"><td class="n">{v.step:,}</td><td>{escape(v.name)}</td>'
        f"<td>{escape(v.what)}</td><td>{'normal: ' * v.normal}{escape(v.advice)}</td></tr>"
        for v in found
    )
    head = "<tr><th>from step</th><th>verdict</th><th>seen</th><th>what to do</th></tr>"
    table = f'<div class="wide"><table>{head}{rows}</table></div>' if rows else ""
    line = f'<p class="sub">{escape(healthy)}</p>' if healthy else ""
    return f"<h3>Verdicts</h3>{line}{table}" if table or line else ""


def _next(command: str) -> str:
    return f"<h3>Next</h3><pre>{escape(command)}</pre>" if command else ""


def _findings(text: str) -> str:
    return f"<h3>Findings</h3><p>{escape(text)}</p>" if text else ""


def _warnings(run_dir: Path) -> str:
    path = run_dir / "log.txt"
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    found = [line.split(" WARNING ", 1)[1] for line in lines if " WARNING " in line]
    found = list(dict.fromkeys(found))
    more = [f"{len(found) - WARNINGS:,} more in log.txt"] if len(found) > WARNINGS else []
    items = "".join(f"<li>{escape(text)}</li>" for text in found[:WARNINGS] + more)
    return f'<h3>Warnings</h3><ul class="warn">{items}</ul>' if items else ""


def _groups(names: Iterable[str]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Plots {title: metrics}: the main ones, and the small ones, where chosen and rejected share a plot."""
    main: dict[str, list[str]] = {}
    small: dict[str, list[str]] = {}
    for name in names:
        leaf = name.rsplit("/", 1)[-1]
        if leaf == "loss":
            main.setdefault("Loss", []).append(name)
        elif leaf in ("lr", "learning_rate"):
            main.setdefault("Learning rate", []).append(name)
        elif leaf == "grad_norm":
            main.setdefault("Gradient norm", []).append(name)
        elif name == "perf/tokens_per_second":
            main.setdefault("Tokens per second", []).append(name)
        elif name == "perf/mfu":
            main.setdefault("MFU", []).append(name)
        elif name.startswith(("time/", "perf/")):
            continue  # the table of times has them
        elif leaf in ("chosen", "rejected"):
            small.setdefault(f"{name.rsplit('/', 1)[0]}: chosen, rejected", []).append(name)
        else:
            small.setdefault(name, []).append(name)
    order = ("Loss", "Learning rate", "Gradient norm", "Tokens per second", "MFU")
    return {title: main[title] for title in order if title in main}, dict(sorted(small.items()))


def _plots(series: Mapping[str, tuple[list[float], list[float]]]) -> str:
    series = {name: line for name, line in series.items() if len(line[0]) > 1}
    plotted = {name: ys for name, (_, ys) in series.items() if not name.startswith(("time/", "perf/"))}
    still = {name: ys[-1] for name, ys in plotted.items() if figures.constant([ys])}
    main, small = _groups(name for name in series if name not in still)
    parts = []
    for kind, groups, size in (("main", main, {}), ("", small, {"width": 380, "height": 220})):
        plots = [
            figures.line_plot({name: series[name] for name in names}, title, "step", **size)
            for title, names in groups.items()
        ]
        if plots:
            parts.append(f'<div class="plots {kind}">{"".join(plots)}</div>')
    if still:
        said = ", ".join(f"{name} {_number(value)}" for name, value in sorted(still.items()))
        parts.append(f'<p class="sub">The same at every logged step: {escape(said)}.</p>')
    return f"<h3>Training</h3>{'<br>'.join(parts)}" if parts else ""


TIMES = {  # in the order of a step
    "first_step": "first step: tracing and compiling", "data": "waiting for data", "step": "training steps", "eval": "evaluation",
    "save": "checkpoints",
}  # fmt: skip


def _times(run_dir: Path, series: Mapping[str, tuple[list[float], list[float]]]) -> str:
    """Where the time of the loop went, and the speed in between."""
    kept = read_json(run_dir / "times.json")
    seconds = {n: kept.get(f"time/{n}") or sum(series.get(f"time/{n}", ((), ()))[1]) for n in TIMES}
    whole, steps = sum(seconds.values()), kept.get("steps") or max(series.get("time/step", ([0], []))[0], default=0)
    if not whole or not steps:
        return ""
    rows = "".join(
        f'<tr><td>{TIMES[n]}</td><td class="n">{s:,.4g} s</td><td class="n">{s / whole:.1%}</td>'
        f'<td class="n">{"" if n == "first_step" else f"{1e3 * s / steps:,.4g} ms"}</td>'
        f'<td class="share"><i style="width:{100 * s / whole:.1f}%"></i></td></tr>'
        for n, s in seconds.items()
    )
    rates = {"tokens per second": "tokens_per_second", "FLOP/s a device": "flops_per_second_per_device", "MFU": "mfu"}
    known = {title: series[f"perf/{n}"][1] for title, n in rates.items() if f"perf/{n}" in series}
    speed = "; ".join(f"{quantity(statistics.median(v))} {title}" for title, v in known.items())
    line = f'<p class="sub">Medians: {speed}. docs/metrics.md says how they are counted.</p>' if speed else ""
    head = "<tr><th>part of the loop</th><th>seconds</th><th>share</th><th>a step</th><th></th></tr>"
    return f'<h3>Time</h3><div class="wide"><table>{head}{rows}</table></div>{line}'


def _figures(run_dir: Path) -> str:
    """Pictures of <run>/figures as images: what a file contains cannot act inside the page."""
    kinds = {".svg": "image/svg+xml", ".png": "image/png"}
    images = []
    for path in sorted((run_dir / "figures").glob("*")):
        if kind := kinds.get(path.suffix):
            data = base64.b64encode(path.read_bytes()).decode()
            images.append(f'<img alt="{escape(path.stem)}" src="data:{kind};base64,{data}">')
    return f'<h3>Figures</h3><div class="figures">{"".join(images)}</div>' if images else ""


def _samples(run_dir: Path) -> str:
    rows = read_jsonl(run_dir / "samples.jsonl")
    if len(rows) > SAMPLES:  # the first show where it began, the last where it came to
        rows = rows[: SAMPLES // 3] + rows[-(SAMPLES - SAMPLES // 3) :]
    names = list(dict.fromkeys(["step", "prompt", "text", *(name for row in rows for name in row)]))
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    lines = []
    for row in rows:
        cells = (
            f'<td class="{"text" if name in ("prompt", "text") else "n"}">'
            f"{escape(_number(row.get(name, ''))[:800])}</td>"
            for name in names
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<h3>Samples</h3><div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>' if rows else ""


def _table(pairs: Iterable[tuple[str, Any]]) -> str:
    rows = (
        f'<tr><td>{escape(str(name))}</td><td class="text">'
        f"{escape(value if isinstance(value, str) else json.dumps(value))}</td></tr>"
        for name, value in pairs
    )
    return f"<table>{''.join(rows)}</table>"


def _details(run_dir: Path, metrics: Mapping[str, Any], series: Mapping[str, Any]) -> str:
    """How to repeat the run, and the folded tables."""
    env = read_json(run_dir / "env.json")
    command = env.get("command", "")
    tables = {
        "All results": flatten(metrics),
        "Last value of every metric": ((name, _number(line[1][-1])) for name, line in sorted(series.items())),
        "Data": flatten(read_json(run_dir / "data_report.json")),
        "Config": flatten(read_json(run_dir / "config.json")),
        "Environment": ((n, v) for n, v in flatten(env) if n != "command"),
    }
    parts = [f"<h3>Repeat</h3><pre>{escape(command)}</pre>"] if command else []
    for title, pairs in tables.items():
        if pairs := list(pairs):
            parts.append(f"<details><summary>{title}</summary>{_table(pairs)}</details>")
    return "".join(parts)
