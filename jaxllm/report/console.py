"""What a run prints: notes that do not tear the live line, and the live line itself."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TextIO

from jaxllm.report.secrets import clean_message

SPARKS = "▁▂▃▄▅▆▇█"
PLAIN = 10_000  # the width of a line that is not redrawn
COLOURS = {"dim": "2", "bold": "1", "green": "32", "red": "31", "yellow": "33"}


def is_terminal(stream: TextIO) -> bool:
    """True where a line can be redrawn."""
    return bool(getattr(stream, "isatty", bool)()) and os.environ.get("TERM") != "dumb"


def can_draw(stream: TextIO) -> bool:
    """True where the stream's encoding holds block characters (LANG=C does not)."""
    try:
        (SPARKS + "·").encode(getattr(stream, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def colour(text: str, name: str, stream: TextIO) -> str:
    """ANSI colour on a terminal, unless NO_COLOR is set."""
    if not is_terminal(stream) or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{COLOURS[name]}m{text}\x1b[0m"


def say(text: str, *, stream: TextIO | None = None) -> None:
    """Print a line now, above the live line if there is one, without secrets."""
    stream = sys.stdout if stream is None else stream
    encoding = getattr(stream, "encoding", None) or "utf-8"
    text = clean_message(text).encode(encoding, "replace").decode(encoding, "replace")
    _put(f"\r\x1b[K{text}\n" if is_terminal(stream) else f"{text}\n", stream)


def _put(text: str, stream: TextIO) -> None:
    """Write now. A run goes on when nobody reads its output any more (`| head`): it is in log.txt too."""
    with contextlib.suppress(BrokenPipeError):
        stream.write(text)
    unread(stream)


def unread(stream: TextIO) -> bool:
    """Flush; whether the reader of the stream has gone. What is still written then goes nowhere, and nothing fails by it."""
    try:
        stream.flush()
        if not _gone(stream):
            return False
    except BrokenPipeError:
        pass
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
    return True


def _gone(stream: TextIO) -> bool:
    """Whether a stream is a pipe without a reader: what is not buffered has failed before, and a flush does not tell."""
    if not hasattr(select, "poll"):
        return False
    try:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):  # no file, such as a test's
        return False


def printable(text: str) -> str:
    """Text of a model or a file as a terminal may have it: characters that could steer it are spelt out."""
    return "".join(c if c in "\n\t\u200c\u200d" or c.isprintable() else ascii(c)[1:-1] for c in text)


def sparkline(values: list[float]) -> str:
    """One block character a value, from the least to the greatest; blanks for what is not finite."""
    finite = [v for v in values if v == v and abs(v) != float("inf")]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((v - low) * scale)] if v in finite else " " for v in values)


def bar(share: float, width: int, *, unicode: bool = True) -> str:
    """A bar of `width` characters, filled from the left."""
    full = round(min(max(share, 0.0), 1.0) * width)
    return ("█" if unicode else "#") * full + ("░" if unicode else ".") * (width - full)


def duration(seconds: float) -> str:
    """41s, 3m04s, 2h05m."""
    seconds = int(round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def quantity(number: float) -> str:
    """950, 6.9k, 1.27M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


@dataclass(frozen=True)
class Progress:
    """One live line of a loop: update(step, loss, tokens_per_step), then close()."""

    total: int
    label: str
    stream: TextIO
    clock: Callable[[], float]
    losses: deque = field(default_factory=lambda: deque(maxlen=40))
    paces: deque = field(default_factory=lambda: deque(maxlen=20))
    last: dict[str, Any] = field(default_factory=dict)

    def update(self, step: int, loss: float, tokens_per_step: float = 0, eval: float | None = None) -> None:
        """Count a step. The first call only sets the clock: what came before it was compilation."""
        now, last = self.clock(), self.last
        if "time" in last and step > last["step"]:
            self.paces.append((now - last["time"]) / (step - last["step"]))
        last.update(time=now, step=step, tokens=tokens_per_step)
        last["eval"] = last.get("eval") if eval is None else float(eval)
        self.losses.append(float(loss))
        if is_terminal(self.stream):
            self._redraw()
        elif self._due(now, step):
            last.update(printed=now, printed_step=step)
            _put(self._line(PLAIN) + "\n", self.stream)

    def close(self) -> None:
        """End the live line, so that what follows starts on its own."""
        if is_terminal(self.stream) and self.last:
            _put("\n", self.stream)
        elif self.last and self.last.get("printed_step") != self.last["step"]:
            _put(self._line(PLAIN) + "\n", self.stream)

    def _due(self, now: float, step: int) -> bool:
        """First step, last step, and between them every 10 s or 1 %, whichever is later."""
        if "printed" not in self.last or step >= self.total:
            return True
        return now - self.last["printed"] >= 10 and step - self.last["printed_step"] >= self.total / 100

    def _redraw(self) -> None:
        width = shutil.get_terminal_size().columns - 1
        line = self._line(width)
        # spaces over the rest of a longer earlier line: no escape codes, so NO_COLOR output stays plain
        pad = max(0, min(self.last.get("drawn", 0), width) - len(line))
        self.last["drawn"] = len(line)
        _put("\r" + line + " " * pad, self.stream)

    def _line(self, width: int) -> str:
        """The parts in order, the least important left out until the line fits."""
        unicode, last, step = can_draw(self.stream), self.last, self.last["step"]
        share = step / self.total if self.total else 1.0
        pace = statistics.median(self.paces) if self.paces else None
        parts = [  # (rank, text): rank 0 stays longest
            (0, f"{self.label:<8} {step:>{len(str(self.total))}}/{self.total}"),
            (5, bar(share, 12, unicode=unicode) if width < PLAIN else ""),
            (4, f"{100 * share:3.0f}%"),
            (0, f"loss {self.losses[-1]:.4g}"),
            (3, "" if last["eval"] is None else f"eval {last['eval']:.4g}"),
            (2, f"{quantity(last['tokens'] / pace)} tok/s" if pace and last["tokens"] else ""),
            (1, f"eta {duration(pace * (self.total - step))}" if pace is not None else ""),
        ]
        parts = [part for part in parts if part[1]]
        while len(parts) > 1 and len("  ".join(text for _, text in parts)) > width:
            parts.remove(max(parts, key=lambda part: part[0]))
        room = width - len("  ".join(text for _, text in parts)) - 2
        if unicode and room >= 8 and width < PLAIN:  # the curve takes what the numbers leave
            after = next((i for i, part in enumerate(parts) if part[1].startswith("loss")), 0)
            parts.insert(after + 1, (0, sparkline(list(self.losses)[-room:])))
        return "  ".join(text for _, text in parts)[:width]


def progress(
    total: int, label: str, *, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
) -> Progress:
    """A live line on a terminal; plain full lines, without carriage returns, anywhere else."""
    return Progress(total, label, sys.stdout if stream is None else stream, clock)
