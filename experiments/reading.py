"""A user's rows: checked one by one, what is bad named or left out, and what came of them kept in data_report.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxllm.data.text import checked_rows
from jaxllm.report import metrics
from jaxllm.report.files import dump, read_json, write_atomic

MOST_CUT = metrics.find("data/truncated").high  # of the examples, that are cut without a warning


def keep_report(run: Any, what: str, report: dict) -> None:
    """Add to data_report.json."""
    if run.writes:
        path, counts = run.path("data_report.json"), {name: x for name, x in report.items() if name != "untrained_tokens"}
        write_atomic(path, dump(read_json(path) | {what: counts}))


def checked(config: Any, run: Any, path: str | Path, check: Callable[[Any, str], Any]) -> list[Any]:
    """check(row, where) of a file's rows; bad rows end the run, or are left out and named, as config.data.on_error says."""
    rows, bad = checked_rows(path, check, on_error=config.data.on_error)
    left_out(run, path, bad, len(rows) + len(bad))
    return rows


def left_out(run: Any, path: str | Path, bad: list[str], of: int) -> None:
    """Say which rows were left out, and keep it in data_report.json."""
    if bad:
        keep_report(run, f"left out of {path}", {"rows": len(bad), "of": of, "errors": bad})
        run.warn(f"{path}: {len(bad):,} of {of:,} rows were left out (all in data_report.json): {'; '.join(bad[:3])}")
