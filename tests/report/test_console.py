"""The live line, its plain form off a terminal, and the small formatters."""

import io
import re

import pytest

from jaxllm.report import console


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


class Ascii(io.StringIO):
    encoding = "ascii"


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")


def drive(stream, seconds, *, total=None, first=0.0, **more):
    """Updates at the end of each step; `first` is what the first one took (compilation)."""
    now = [0.0]
    line = console.progress(total or len(seconds), "train", stream=stream, clock=lambda: now[0])
    for step, took in enumerate(seconds, 1):
        now[0] += took + (first if step == 1 else 0.0)
        line.update(step, 3.0 / step, 1000, **more)
    line.close()
    return stream.getvalue()


def test_off_a_terminal_whole_lines_without_carriage_returns(plain):
    text = drive(io.StringIO(), [1.0] * 100)
    assert "\r" not in text and "\x1b" not in text
    steps = [int(s) for s in re.findall(r"(\d+)/100", text)]
    assert steps == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100]  # the first, every 10 s, the last


def test_off_a_terminal_one_percent_is_the_later_bound(plain):
    steps = [int(s) for s in re.findall(r"(\d+)/1000", drive(io.StringIO(), [20.0] * 30, total=1000))]
    assert steps == [1, 11, 21, 30]  # 10 s pass each step, but 1 % is 10 steps; close prints where it ended


def test_eta_leaves_compilation_out(plain):
    text = drive(io.StringIO(), [2.0] * 7, total=107, first=500.0)
    assert "eta 3m20s" in text.splitlines()[-1]  # 100 steps of 2 s; with the first step in, hours
    assert "500 tok/s" in text


def test_eta_is_a_median_so_one_slow_step_moves_nothing(plain):
    text = drive(io.StringIO(), [2.0, 2.0, 2.0, 90.0, 2.0, 2.0, 2.0], total=107)
    assert "eta 3m20s" in text.splitlines()[-1]


def test_no_eta_after_the_first_step_alone(plain):
    assert "eta" not in drive(io.StringIO(), [2.0], total=10)


def test_terminal_redraws_one_line_and_ends_it(plain):
    text = drive(Terminal(), [1.0] * 50)
    assert text.count("\n") == 1 and text.endswith("\n")
    assert text.count("\r") == 50
    assert "█" in text and "▁" in text and "eta" in text


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 120])
def test_width_is_respected(plain, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = drive(Terminal(), [1.0] * 50, eval=2.5).rstrip("\n").split("\r")[1:]
    assert max(len(line) for line in lines) < columns
    assert "loss" in lines[-1] or columns == 20
    assert ("eval" in lines[-1]) == (columns >= 60)  # the least important parts go first


def test_shorter_line_covers_the_longer_one_before(plain):
    stream = Terminal()
    line = console.progress(10, "train", stream=stream, clock=lambda: 0.0)
    line.update(1, 1.23456e-12)
    line.update(2, 1.0)
    first, second = stream.getvalue().split("\r")[1:]
    assert len(second) >= len(first.rstrip())


def test_no_color(plain, monkeypatch):
    assert console.colour("x", "red", Terminal()) == "\x1b[31mx\x1b[0m"
    assert console.colour("x", "red", io.StringIO()) == "x"
    monkeypatch.setenv("NO_COLOR", "1")
    assert console.colour("x", "red", Terminal()) == "x"


def test_an_ascii_stream_gets_ascii(plain):
    stream = Ascii()
    console.say("▸ naïve", stream=stream)
    drive(stream, [1.0] * 3)
    stream.getvalue().encode("ascii")


def test_say_clears_the_live_line_only_on_a_terminal(plain):
    terminal, pipe = Terminal(), io.StringIO()
    console.say("saved", stream=terminal)
    console.say("saved", stream=pipe)
    assert terminal.getvalue() == "\r\x1b[Ksaved\n" and pipe.getvalue() == "saved\n"


def test_sparkline_and_bar():
    assert console.sparkline([0, 7, 3.5]) == "▁█▅"
    assert console.sparkline([2.0, 2.0]) == "▁▁"
    assert console.sparkline([1.0, float("nan"), 2.0]) == "▁ █"
    assert console.sparkline([]) == ""
    assert console.bar(0.5, 4) == "██░░" and console.bar(7.0, 4, unicode=False) == "####"


@pytest.mark.parametrize(
    ("seconds", "shown"), [(41, "41s"), (184, "3m04s"), (7500, "2h05m"), (59.6, "1m00s")]
)
def test_duration(seconds, shown):
    assert console.duration(seconds) == shown


@pytest.mark.parametrize(("number", "shown"), [(950, "950"), (6900, "6.9k"), (1.27e6, "1.27M"), (0.5, "0.5")])
def test_quantity(number, shown):
    assert console.quantity(number) == shown
