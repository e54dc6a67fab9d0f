"""Plots as SVG text, without a plotting library: lines, bars, calibration; save_png is matplotlib's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

# told apart in every kind of colour blindness (Okabe and Ito, 2008), without their yellow, which white paper swallows
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4b5563")
DASHES = ("", "6 3", "2 3")  # for lines beyond the colours
GRID, AXIS, TEXT = "#e5e7eb", "#9ca3af", "#374151"
LEFT, RIGHT, BOTTOM = 58, 14, 44
FLAT = 5e-6  # a range smaller than that, beside the values, is float32's rounding: a flat line, with ticks that differ
POINTS = 400  # more are averaged in buckets: a screen shows no more, and the page stays small

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]


class Frame(NamedTuple):
    """The plotting area: pixel and data ranges."""

    width: int
    height: int
    top: int
    x: tuple[float, float]
    y: tuple[float, float]

    def px(self, value: float) -> float:
        """Pixel column of a data value."""
        low, high = self.x
        return LEFT + (value - low) / (high - low) * (self.width - LEFT - RIGHT)

    def py(self, value: float) -> float:
        """Pixel row of a data value."""
        low, high = self.y
        return self.height - BOTTOM - (value - low) / (high - low) * (self.height - BOTTOM - self.top)


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten) from low to high; only whole ones where asked."""
    raw = (high - low) / max(count, 1)
    if not (math.isfinite(raw) and raw > 0):
        return [low]
    power = max(10.0 ** math.floor(math.log10(raw)), 1.0 if whole else 0.0)
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999 and not (whole and power * m % 1))
    first = math.ceil(low / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_label(value: float) -> str:
    """0.001, 25, 1.5k, 2M: short and without needless zeros."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):g}{unit}"
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:.8g}"
    return f"{value:.1e}".replace("e-0", "e-").replace(".0e", "e")


def _span(values: Sequence[float], pad: float = 0.0, flat: float = FLAT) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low <= flat * max(abs(low), abs(high), 1e-30):
        room = abs(low) * 0.1 or 1.0
        return low - room, high + room
    return low - pad * (high - low), high + pad * (high - low)


def _finite(xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
    pairs = ((x, y) for x, y in zip(xs, ys, strict=True) if x is not None and y is not None)
    return [(float(x), float(y)) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]


def thin(points: Sequence[tuple[float, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """At most `most` points, each the mean of a run of neighbours."""
    if len(points) <= most:
        return list(points)
    edges = [round(i * len(points) / most) for i in range(most + 1)]
    runs = [points[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def noisy(points: Sequence[tuple[float, float]]) -> bool:
    """True for a line that turns at more than a quarter of its points: a schedule is drawn as it is."""
    rises = [b > a for (_, a), (_, b) in zip(points, points[1:], strict=False)]
    return len(points) > 60 and sum(a != b for a, b in zip(rises, rises[1:], strict=False)) > len(points) / 4


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A centred moving average over a twentieth of the points."""
    half = max(1, len(points) // 40)
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    bounds = [(max(0, i - half), min(len(points), i + half + 1)) for i in range(len(points))]
    return [(points[i][0], (sums[b] - sums[a]) / (b - a)) for i, (a, b) in enumerate(bounds)]


def constant(lines: Sequence[Sequence[float]]) -> bool:
    """Whether all values of all lines are one number: nothing for a plot to show."""
    return len({y for line in lines for y in line}) < 2


def _text(x: float, y: float, text: str, *, anchor: str = "middle", size: float = 11, more: str = "") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{TEXT}" {more}>'
        f"{escape(text)}</text>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, more: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" {more}/>'


def _path(frame: Frame, points: Sequence[tuple[float, float]], line: str, more: str = "") -> str:
    at = " ".join(f"{frame.px(x):.1f},{frame.py(y):.1f}" for x, y in points)
    return f'<polyline points="{at}" fill="none" {line} stroke-linejoin="round" {more}/>'


def _dots(frame: Frame, points: Sequence[tuple[float, float]], colour: str) -> str:
    return "".join(
        f'<circle cx="{frame.px(x):.1f}" cy="{frame.py(y):.1f}" r="2.6" fill="{colour}"/>' for x, y in points
    )


def _axes(frame: Frame, xlabel: str, ylabel: str, x_ticks: bool = True, whole: bool = False) -> list[str]:
    bottom, right = frame.height - BOTTOM, frame.width - RIGHT
    parts = []
    for value in ticks(*frame.y):
        row = frame.py(value)
        parts.append(_line(LEFT, row, right, row, GRID))
        parts.append(_text(LEFT - 6, row + 4, tick_label(value), anchor="end"))
    for value in ticks(*frame.x, 6, whole) if x_ticks else []:
        column = frame.px(value)
        parts.append(_line(column, bottom, column, bottom + 4, AXIS))
        parts.append(_text(column, bottom + 17, tick_label(value)))
    parts.append(_line(LEFT, bottom, right, bottom, AXIS))
    parts.append(_text((LEFT + right) / 2, frame.height - 8, xlabel))
    middle = (frame.top + bottom) / 2
    parts.append(_text(13, middle, ylabel, more=f'transform="rotate(-90 13 {middle:.1f})"'))
    return parts


def stroke(i: int) -> str:
    """The attributes of line number i: its colour, and dashes where the colours have come round."""
    dashes = DASHES[i // len(COLOURS) % len(DASHES)]
    return f'stroke="{COLOURS[i % len(COLOURS)]}"' + f' stroke-dasharray="{dashes}"' * bool(dashes)


def fitted(text: str, room: float, size: float) -> str:
    """A text that fits `room` pixels, without its middle where it is longer."""
    most = max(3, int(room / (0.58 * size)))
    return text if len(text) <= most else text[: most // 2] + "…" + text[len(text) - (most - most // 2 - 1) :]


def _legend(names: Sequence[str], width: int) -> tuple[list[str], int]:
    """Swatches and names in rows under the title, and the height they take."""
    parts, x, row = [], LEFT, 0
    for i, name in enumerate(names):
        name = fitted(name, width - LEFT - 18 - RIGHT, 11)
        room = 26 + 6.4 * len(name)
        if x > LEFT and x + room > width:
            x, row = LEFT, row + 1
        y = 38 + 16 * row
        parts.append(f'<line x1="{x:.1f}" y1="{y - 4}" x2="{x + 14:.1f}" y2="{y - 4}" {stroke(i)} stroke-width="3"/>')
        parts.append(_text(x + 18, y, name, anchor="start"))
        x += room
    return parts, 16 * (row + 1)


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{escape(title)}" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
        + _text(LEFT, 18, fitted(title, width - LEFT - RIGHT, 13.5), anchor="start", size=13, more='font-weight="600"')
        + "".join(parts)
        + "</svg>"
    )


def line_plot(
    series: Series, title: str, xlabel: str = "step", ylabel: str = "", *, bands: Series | None = None, width: int = 520,
    height: int = 280,
) -> str:  # fmt: skip
    """An SVG of lines {name: (x, y)}. Long noisy lines are drawn faint under their moving average.

    bands: {name: (low, high)} at the line's own points, shaded behind it: an interval.
    """
    points = {name: found for name, (x, y) in series.items() if (found := _finite(x, y))}
    if not points:
        return _svg(width, height, title, [_text(width / 2, height / 2, "no data")])
    legend, room = _legend(list(points), width) if len(points) > 1 else ([], 0)
    x_range = _span([x for line in points.values() for x, _ in line], flat=0.0)
    whole = all(x.is_integer() for line in points.values() for x, _ in line)  # steps
    points = {name: thin(line) for name, line in points.items()}
    edges = _edges(series, bands or {})
    heights = [y for line in [*points.values(), *edges.values()] for _, y in line]
    frame = Frame(width, height, 32 + room, x_range, _span(heights, 0.04))
    parts = _axes(frame, xlabel, ylabel, whole=whole) + legend
    for i, (name, line) in enumerate(points.items()):
        colour = COLOURS[i % len(COLOURS)]
        if name in edges:
            at = " ".join(f"{frame.px(x):.1f},{frame.py(y):.1f}" for x, y in edges[name])
            parts.append(f'<polygon points="{at}" fill="{colour}" fill-opacity="0.15"/>')
        if noisy(line):
            parts.append(_path(frame, line, stroke(i), 'stroke-width="1" stroke-opacity="0.3"'))
            line = smooth(line)
        parts.append(_path(frame, line, stroke(i), 'stroke-width="2"'))
        if len(line) <= 25:
            parts.append(_dots(frame, line, colour))
    return _svg(width, height, title, parts)


def _edges(series: Series, bands: Series) -> dict[str, list[tuple[float, float]]]:
    """The outline of each band: along its low edge and back along the high one."""
    outlines = {}
    for name, (low, high) in bands.items():
        x = series[name][0]
        outline = _finite(x, low) + _finite(x, high)[::-1]
        if len(outline) > 2:
            outlines[name] = outline
    return outlines


def bar_plot(
    labels: Sequence[str],
    values: Sequence[float],
    title: str,
    ylabel: str = "",
    *,
    errors: Sequence[float] | None = None,
    width: int = 520,
    height: int = 280,
) -> str:
    """An SVG of a bar for each label, with a line of one standard error each way where `errors` are given."""
    bars = list(zip(labels, values, errors or [0.0] * len(labels), strict=True))
    shown = [(name, v, e or 0.0) for name, v, e in bars if v is not None and math.isfinite(v)]
    if not shown:
        return _svg(width, height, title, [_text(width / 2, height / 2, "no data")])
    ends = [v + sign * e for _, v, e in shown for sign in (-1, 1)]
    low, high = _span([0.0, *ends], 0.08)
    low = 0.0 if min(ends) >= 0 else low
    frame = Frame(width, height, 34, (-0.5, len(shown) - 0.5), (low, high if max(ends) > 0 else 0.0))
    parts = _axes(frame, "", ylabel, x_ticks=False)
    slot = (width - LEFT - RIGHT) / len(shown)
    small = max(6.0, min(11.0, slot / (0.7 * max(len(name) for name, _, _ in shown))))  # labels beside one another
    for i, (name, value, error) in enumerate(shown):
        x, zero, y = frame.px(i), frame.py(0.0), frame.py(value)
        wide = 0.62 * slot
        parts.append(
            f'<rect x="{x - wide / 2:.1f}" y="{min(y, zero):.1f}" width="{wide:.1f}" '
            f'height="{abs(zero - y):.1f}" fill="{COLOURS[0]}" fill-opacity="0.85"/>'
        )
        if error:
            ends = (x, frame.py(value - error), x, frame.py(value + error))
            parts.append(_line(*ends, TEXT, 'stroke-width="1.5"'))
        top = min(y, zero, frame.py(value + error))
        said = f"{value:.3g}" if abs(value) < 1000 else tick_label(round(value))
        parts.append(_text(x, top - 5, said, size=10))
        parts.append(_text(x, height - BOTTOM + 17, fitted(name, 1.2 * slot, small), size=round(small, 1)))
    parts.append(_line(LEFT, frame.py(0.0), width - RIGHT, frame.py(0.0), AXIS))
    return _svg(width, height, title, parts)


def calibration_plot(
    predicted: Sequence[float],
    observed: Sequence[float],
    counts: Sequence[float],
    title: str = "Calibration",
    *,
    width: int = 340,
    height: int = 340,
) -> str:
    """An SVG of observed frequency against predicted probability, a circle's area the count of its bin."""
    rows = [(p, o, n) for p, o, n in zip(predicted, observed, counts, strict=True) if n > 0]
    low = min([0.0, *(min(p, o) for p, o, _ in rows)])
    high = max([1.0, *(max(p, o) for p, o, _ in rows)])
    frame = Frame(width, height, 34, (low, high), (low, high))
    parts = _axes(frame, "predicted probability", "observed frequency")
    dashed = 'stroke-dasharray="4 4"'
    parts.append(_line(frame.px(low), frame.py(low), frame.px(high), frame.py(high), AXIS, dashed))
    parts.append(_path(frame, [(p, o) for p, o, _ in rows], stroke(0), 'stroke-width="1.5"'))
    most = max([n for _, _, n in rows], default=1)
    for p, o, n in rows:
        radius = 2.5 + 6.5 * math.sqrt(n / most)
        parts.append(
            f'<circle cx="{frame.px(p):.1f}" cy="{frame.py(o):.1f}" r="{radius:.1f}" fill="{COLOURS[0]}" '
            f'fill-opacity="0.55"><title>{p:.2f} predicted, {o:.2f} observed, {n:g} cases</title></circle>'
        )
    return _svg(width, height, title, parts)


def save_png(
    path: Path | str, series: Series, title: str, xlabel: str = "step", ylabel: str = ""
) -> Path | None:
    """The same lines as a PNG; None where matplotlib (the `plots` extra) is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(6.4, 3.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    for name, (x, y) in series.items():
        points = thin(_finite(x, y))
        axes.plot([x for x, _ in points], [y for _, y in points], label=name)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend()
    figure.savefig(path)
    return Path(path)
