"""Plots: valid SVG, points where the data are, nothing from outside."""

import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from jaxllm.report import figures

NAME = "{http://www.w3.org/2000/svg}"


def test_a_band_is_shaded_behind_its_line():
    lines = {"a": ([0, 1, 2], [1.0, 2.0, 3.0]), "b": ([0, 1, 2], [0.0, 0.0, 0.0])}
    svg = figures.line_plot(lines, "t", bands={"a": ([0.5, 1.5, 2.5], [1.5, 2.5, 9.0])})
    assert svg.count("<polygon") == 1 and ">8<" in svg  # the axis makes room for the band
    assert "<polygon" not in figures.line_plot(lines, "t")


def polylines(svg):
    return [
        [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        for line in ElementTree.fromstring(svg).iter(f"{NAME}polyline")
    ]


def texts(svg):
    return [text.text for text in ElementTree.fromstring(svg).iter(f"{NAME}text")]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0, 0.5, [0, 0.1, 0.2, 0.3, 0.4, 0.5]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (3, 3, [3]),
        (0, 4e-13, [0, 1e-13, 2e-13, 3e-13, 4e-13]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert figures.ticks(low, high) == pytest.approx(expected, abs=0)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (25, "25"), (15000, "15k"), (2e6, "2M"), (0.001, "0.001"), (2.5e-4, "2.5e-4"), (1e-5, "1e-5")],
)
def test_tick_labels(value, shown):
    assert figures.tick_label(value) == shown


def test_line_plot_puts_points_where_the_data_are():
    (line,) = polylines(figures.line_plot({"a": ([0, 5, 10], [1.0, 3.0, 1.0])}, "t"))
    (x0, y0), (x1, y1), (x2, y2) = line
    assert x1 == pytest.approx((x0 + x2) / 2) and y0 == y2
    assert y1 < y0  # up is a smaller pixel row
    assert x0 == figures.LEFT and x2 == 520 - figures.RIGHT


def test_line_plot_leaves_out_what_is_not_finite():
    svg = figures.line_plot({"a": ([0, 1, 2, 3], [1.0, math.nan, None, 2.0]), "b": ([0], [math.inf])}, "t")
    assert [len(line) for line in polylines(svg)] == [2]
    assert "nan" not in svg and "inf" not in svg


def test_legend_only_with_several_lines_and_everything_escaped():
    evil = "<script>&"
    two = figures.line_plot({evil: ([0, 1], [0, 1]), "b": ([0, 1], [1, 0])}, evil)
    assert texts(two).count(evil) == 2 and "<script>" not in two
    assert texts(figures.line_plot({"only": ([0, 1], [0, 1])}, "t")).count("only") == 0


def test_noise_gets_a_moving_average_and_a_schedule_does_not():
    steps = np.arange(300)
    noise = np.random.default_rng(0).normal(size=300)
    faint, bold = polylines(figures.line_plot({"a": (steps, noise)}, "t"))
    assert np.std([y for _, y in bold]) < 0.5 * np.std([y for _, y in faint])
    assert len(polylines(figures.line_plot({"lr": (steps, np.cos(steps / 100))}, "t"))) == 1


def test_thin_keeps_the_mean_and_the_number():
    points = [(float(i), float(i % 7)) for i in range(10_000)]
    thinned = figures.thin(points)
    assert len(thinned) == figures.POINTS
    assert np.mean([y for _, y in thinned]) == pytest.approx(np.mean([y for _, y in points]), abs=1e-6)


@pytest.mark.parametrize("values", [[3.0] * 5, [0.0], [1e-30, 1e-30], [1e9, 1e9 + 1]])
def test_flat_lines_do_not_divide_by_zero(values):
    svg = figures.line_plot({"a": (list(range(len(values))), values)}, "t")
    assert all(math.isfinite(number) for line in polylines(svg) for point in line for number in point)


def test_steps_have_whole_ticks():
    assert figures.ticks(1, 16, 6, whole=True) == [5, 10, 15] and figures.ticks(0, 2, 6, whole=True) == [0, 1, 2]
    shown = texts(figures.line_plot({"a": (range(1, 17), range(1, 17))}, "t"))
    assert not any("." in text for text in filter(None, shown))
    assert "0.2" in texts(figures.line_plot({"a": ([0.0, 0.25, 1.0], [0, 1, 4])}, "t"))


def test_rounding_is_drawn_as_a_flat_line_and_ticks_differ():
    svg = figures.line_plot({"ratio": ([0, 1, 2], [1.0, 1 + 6e-8, 1 - 6e-8])}, "t")
    (line,) = polylines(svg)
    assert max(y for _, y in line) - min(y for _, y in line) < 0.2  # of a pixel
    for spread in (6e-8, 2e-5, 1e-3):
        ticks = [t for t in texts(figures.line_plot({"a": ([0, 1], [1.0, 1 + spread])}, "t", "")) if t and t[0].isdigit()]
        assert len(set(ticks[:-2])) == len(ticks[:-2]) > 2


def test_every_line_of_many_looks_different():
    lines = {f"run {i}": ([0, 1], [i, i + 1]) for i in range(20)}
    drawn = ElementTree.fromstring(figures.line_plot(lines, "t")).iter(f"{NAME}polyline")
    assert len({(line.get("stroke"), line.get("stroke-dasharray")) for line in drawn}) == 20


def test_long_names_and_many_bars_stay_inside():
    long = "a/very/long/directory/" * 8 + "end"
    found = [text for text in texts(figures.line_plot({long: ([0, 1], [0, 1]), "b": ([0, 1], [1, 0])}, long)) if text]
    assert all(len(text) < 75 for text in found) and any(text.endswith("/end") for text in found)
    labels = [f"<={2**i}" for i in range(3, 18)]
    bars = ElementTree.fromstring(figures.bar_plot(labels, [1.0] * 15, "t")).iter(f"{NAME}text")
    sizes = {t.text: float(t.get("font-size")) for t in bars if (t.text or "").startswith("<=")}
    assert list(sizes) == labels and all(0.6 * size * len(name) < 448 / 15 + 1 for name, size in sizes.items())


def test_empty_plots_say_so():
    for svg in (
        figures.line_plot({}, "t"),
        figures.bar_plot([], [], "t"),
        figures.bar_plot(["a"], [None], "t"),
    ):
        assert "no data" in texts(svg)


def test_bars_have_the_height_of_their_values():
    svg = figures.bar_plot(["a", "b"], [1.0, 2.0], "t", errors=[0.1, 0.2])
    heights = [float(bar.get("height")) for bar in list(ElementTree.fromstring(svg).iter(f"{NAME}rect"))[1:]]
    assert heights[1] == pytest.approx(2 * heights[0], rel=0.01)


def test_calibration_draws_one_circle_a_filled_bin():
    svg = figures.calibration_plot([0.1, 0.5, 0.9], [0.2, 0.5, float("nan")], [10, 40, 0])
    circles = list(ElementTree.fromstring(svg).iter(f"{NAME}circle"))
    assert len(circles) == 2 and float(circles[1].get("r")) > float(circles[0].get("r"))


def test_save_png(tmp_path):
    series = {"a": ([0, 1], [0, 1]), "b": ([0, 1], [1, None])}
    path = figures.save_png(tmp_path / "a.png", series, "t")
    assert path is None or path.read_bytes().startswith(b"\x89PNG")
