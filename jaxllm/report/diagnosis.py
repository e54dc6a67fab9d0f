"""What a run's metrics say of its health: verdicts, each with the step, what was seen and what to do about it.

Pure functions of what was logged: the bounds of `metrics`, and the `rules`, which compare a metric with its past or with another.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxllm.report import metrics, rules
from jaxllm.report.files import read_json, read_jsonl
from jaxllm.report.rules import TREND, History, Verdict

WATCHED = {
    "train/loss", "eval/loss", "train/lr", "train/grad_norm", "train/mean_token_accuracy", "time/data", "rewards/chosen",
    "rewards/rejected", "rewards/accuracies", "train/accuracy", "logps/chosen", "logps/rejected", "train/entropy",
    "policy/entropy_avg", "objective/entropy", "objective/kl", "train/kl", "train/reward", "objective/scores",
    "completions/mean_length", "rewards/readable/mean", "first/policy/approxkl_avg", "first/kl", "loss/value_avg", "moe/load_min",
}  # fmt: skip


def history(rows: Iterable[Mapping[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """The lines of metrics.jsonl as {metric: (steps, values)}; a value that was not finite (null there) is nan."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "t"):
                steps, values = found.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(math.nan if value is None else float(value))
    return found


def verdicts(history: History) -> list[Verdict]:
    """All that the rules have to say, in the order of steps, what is normal last."""
    found = [v for rule in rules.RULES for v in [rule(history)] if v is not None]
    named = {v.name for v in found}
    found += [v for name in history for v in [_bounds(name, history)] if v is not None and name not in named]
    return sorted(found, key=lambda v: (v.normal, v.step))


def watched(history: History) -> list[str]:
    """The logged metrics that a rule or a bound looks at."""
    bounded = lambda name: (m := metrics.find(name)) is not None and (m.low is not None or m.high is not None)  # noqa: E731
    return [name for name in history if name in WATCHED or bounded(name)]


def text(verdict: Verdict) -> str:
    """One line."""
    mark = "normal: " if verdict.normal else ""
    return f"{mark}{verdict.what}: {verdict.advice}"


def summary(history: History, found: Sequence[Verdict]) -> str:
    """What stands where no verdict is to be acted on: how many metrics were looked at, or that the run is too short for it."""
    if any(not v.normal for v in found):
        return ""
    n, longest = len(watched(history)), max((len(steps) for steps, _ in history.values()), default=0)
    if longest < TREND:
        short = f"no verdicts: {longest} logged steps, fewer than the {TREND} that a trend needs"
        return f"{short}; {n} watched metrics without a fault so far"
    return f"no verdicts: all {n} watched metrics within their healthy ranges ({len(history)} logged)"


def _bounds(name: str, history: History) -> Verdict | None:
    """A metric that is outside its table's bounds at the end of the run; one that must be 0 ever."""
    m = metrics.find(name)
    if m is None or (m.low is None and m.high is None):
        return None
    _, steps, values = rules.finite(history, name)
    if not values:
        return None
    late = (rules.first_and_last(values) or (0, statistics.fmean(values)))[1] if m.high != 0 else max(values)
    low, high = -math.inf if m.low is None else m.low, math.inf if m.high is None else m.high
    recovered = m.high != 0 and len(values) < TREND and low <= values[-1] <= high  # a mean of few would still say what was
    if low <= late <= high or recovered:
        return None
    side, bound = ("below", low) if late < low else ("above", high)
    out = [step for step, value in zip(steps, values, strict=True) if not low <= value <= high]
    step = int(out[0] if m.high == 0 else rules.since(steps, values, lambda v: not low <= v <= high))
    return Verdict(name, step, f"{name} {rules.shown(late)} is {side} {rules.shown(bound)} since step {step}", m.advice)


def examples_cut(run_dir: Path) -> dict[str, tuple[int, int]]:
    """{what was read: (its examples that were cut at the length, all of them)} of a run directory's data_report.json."""
    report = read_json(run_dir / "data_report.json")
    counts = {what: n for what, n in report.items() if isinstance(n, dict) and {"truncated", "examples"} <= n.keys()}
    return {what: (n["truncated"], n["examples"]) for what, n in counts.items()}


def truncated(run_dir: Path) -> list[Verdict]:
    """The files of which more was cut than the table's `data/truncated` allows."""
    bound, found = metrics.find("data/truncated"), []
    for what, (cut, of) in examples_cut(run_dir).items():
        if cut > bound.high * of:
            said = f"{what}: {cut:,} of {of:,} examples ({cut / of:.0%}) are longer than data.length and were cut"
            found.append(Verdict("data/truncated", 0, said, bound.advice))
    return found


def of_run(run_dir: Path) -> tuple[list[Verdict], str]:
    """(verdicts, summary) of a run directory's metrics.jsonl and data_report.json; ([], "") where nothing was logged."""
    found = history(read_jsonl(run_dir / "metrics.jsonl"))
    said = truncated(run_dir) + verdicts(found)
    return said, summary(found, said) if found else ""
