"""What a check says, the table of it, and the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.core.types import UserError
from jaxllm.report.files import dump

WORDS = {True: "ok", False: "FAILED", None: "does not apply"}


class Enough(Exception):
    """Raised in place of a training that nobody wants to see the end of."""


class Verdict(NamedTuple):
    """number: what was measured, which holds up to `tolerance`; ok: None where the check does not apply; said: what was looked
    at, or why not; do: what to do where it failed."""

    name: str
    number: float | None
    tolerance: float | None
    ok: bool | None
    said: str = ""
    do: str = ""


def at_most(name: str, number: float, tolerance: float, said: str, do: str) -> Verdict:
    """number <= tolerance; what is no number has failed."""
    return Verdict(name, float(number), float(tolerance), bool(number <= tolerance), said, do)


def absent(name: str, why: str) -> Verdict:
    return Verdict(name, None, None, None, why)


def attempted(name: str, check: Callable[[], Verdict], do: str) -> Verdict:
    """The check's verdict; one that raises has failed, with what it raised."""
    try:
        return check()
    except Enough:
        raise
    except UserError as error:
        return Verdict(name, None, None, False, str(error), do)
    except Exception as error:  # whatever a model or a data set of the user's raises is a finding, not the doctor's end
        text = " ".join(str(error).split())[:300]
        return Verdict(name, None, None, False, f"{type(error).__name__}: {text}", do)


def line(v: Verdict) -> str:
    """One row of the table."""
    shown = "" if v.number is None else f"{v.number:.3g}" + ("" if v.tolerance is None else f" (up to {v.tolerance:g})")
    return f"  {WORDS[v.ok]:<14}  {v.name:<22}  {shown:<22}  {v.said}".rstrip()


def advice(verdicts: list[Verdict]) -> list[str]:
    """What to do about each failure."""
    return [f"{v.name}: {v.do}" for v in verdicts if v.ok is False]


def write(path: str, verdicts: list[Verdict], about: dict[str, Any]) -> None:
    """The verdicts as JSON; numbers that are not finite are null."""
    record = {**about, "checks": [v._asdict() for v in verdicts], "failed": [v.name for v in verdicts if v.ok is False]}
    Path(path).write_text(dump(record), encoding="utf-8")
