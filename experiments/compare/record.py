"""A run directory as what can be compared: settings, curves, results, samples and where it came from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.core.types import UserError
from jaxllm.report.diagnosis import history
from jaxllm.report.files import flatten, read_json, read_jsonl
from jaxllm.report.html import stages_of
from jaxllm.report.resume import RESUMABLE
from jaxllm.report.rules import first_and_last


class Record(NamedTuple):
    """config: flat; series: {metric: (steps, values)}; result: its metrics; data: fingerprint of its rows, "" if unknown.

    A value that was not finite is nan.
    """

    name: str
    experiment: str
    config: dict[str, Any]
    env: dict[str, Any]
    series: dict[str, tuple[list[float], list[float]]]
    result: dict[str, Any]
    samples: list[dict[str, Any]]
    data: str
    finished: bool


def read(given: str) -> Record:
    """The record of a run directory. UserError when it is none, or has no metrics of its own."""
    root = Path("runs/latest") if given == "latest" else Path(given)
    if not (root / "config.json").is_file():
        raise UserError(f"{given}: no run directory (it has no config.json): give the directory that a run printed")
    series, result = history(read_jsonl(root / "metrics.jsonl")), read_json(root / "result.json")
    if not series and not result.get("metrics"):
        inside = ", ".join(str(root / stage.name) for stage in stages_of(root))
        hint = f"give one of its stages: {inside}" if inside else "it was stopped before its first logged step"
        raise UserError(f"{given}: the run has no metrics: {hint}")
    env, config = read_json(root / "env.json"), dict(flatten(read_json(root / "config.json")))
    found = {name: math.nan if value is None else value for name, value in result.get("metrics", {}).items()}
    metrics = {name: float(value) for name, value in found.items() if isinstance(value, (int, float))}
    samples = read_jsonl(root / "samples.jsonl")
    return Record(given, env.get("experiment", "?"), config, env, series, metrics, samples, _fingerprint(root), bool(result))


def _fingerprint(root: Path) -> str:
    steps = [p for p in (root / "checkpoints").glob("*") if p.name.isdigit() and (p / "data" / "metadata").is_file()]
    newest = max(steps, key=lambda p: int(p.name), default=None)
    return "" if newest is None else str(read_json(newest / "data" / "metadata").get("fingerprint", ""))


def short_names(records: list[Record]) -> list[str]:
    """Each run's name without the directories that all share."""
    parts = [Path(r.name).parts for r in records]
    least = min(map(len, parts)) - 1
    shared = next((i for i in range(least) if len({p[i] for p in parts}) > 1), least)
    return [str(Path(*p[shared:])) for p in parts]


def final(record: Record, name: str) -> float:
    """A metric at the end: as the run reports it, else the mean of the last fifth of its line, the last value of a short one.

    nan where one of these was not finite: a run that diverged has no value from before it did.
    """
    if name in record.result:
        return record.result[name]
    values = record.series[name][1]
    late = None if name.startswith("eval/") else first_and_last(values)
    return late[1] if late else float(values[-1])


def shared_metrics(records: list[Record]) -> list[str]:
    """The names that all runs have, losses first, speed last; the seconds of parts of the loop are no metrics of a model."""
    order = lambda n: (n.startswith("perf/"), not n.endswith("/loss"), not n.startswith("eval/"), n)  # noqa: E731
    return sorted(set.intersection(*map(_metrics, records)), key=order)


def missing_metrics(records: list[Record]) -> list[str]:
    """The names that only some of the runs have."""
    own = [*map(_metrics, records)]
    return sorted(set.union(*own) - set.intersection(*own))


def _metrics(record: Record) -> set[str]:
    return {name for name in [*record.series, *record.result] if not name.startswith("time/")}


def last_step(record: Record) -> int:
    """The last logged step, 0 where none was."""
    return int(max((steps[-1] for steps, _ in record.series.values()), default=0))


def config_differences(records: list[Record]) -> dict[str, list[Any]]:
    """{setting: its value in each run} of those that are not the same in all."""
    names = dict.fromkeys(name for r in records for name in r.config if name not in RESUMABLE)
    found = {name: [r.config.get(name, "not there") for r in records] for name in names}
    return {name: values for name, values in found.items() if any(v != values[0] for v in values)}


def provenance(records: list[Record]) -> dict[str, list[str]]:
    """{what: its value in each run}: experiment, commit, data, device, versions, when; the versions that differ one by one."""
    rows = {
        "experiment": [r.experiment for r in records],
        "commit": [str(r.env.get("git"))[:12] + "-dirty" * str(r.env.get("git")).endswith("-dirty") for r in records],
        "data": [r.data[:12] or "unknown" for r in records],
        "devices": [", ".join(f"{n} x {kind}" for kind, n in r.env.get("devices", {}).items()) for r in records],
        "started": [str(r.env.get("started", "")) for r in records],
        "finished": ["yes" if r.finished else "no" for r in records],
    }
    packages = dict.fromkeys(name for r in records for name in r.env.get("versions", {}))
    versions = {name: [str(r.env.get("versions", {}).get(name, "-")) for r in records] for name in packages}
    return rows | {name: values for name, values in versions.items() if len(set(values)) > 1}
