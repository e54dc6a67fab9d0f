"""Several reward functions over a batch: weighted, each call bounded in time, failures kept apart from low rewards."""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxllm.core.types import UserError

STARTUP = 60.0  # seconds that a worker may take to import a user's file
PRINTED = 2**16  # bytes of what a worker prints that are passed on
LONGEST = 2**16  # bytes of one answer
HANGS = 3  # calls of one function that may run out of time in a batch; the rest of its rows are then excluded uncalled

Row = Mapping[str, Any]  # prompt, completion, gold, ... : what a reward function may look at


class External(NamedTuple):
    """A user's reward function, called as function(row, **options) in a process of its own.

    source: a .py file or an importable module; rows and options must be JSON values.
    """

    source: str
    name: str = "reward"
    options: Mapping[str, Any] = {}


class Batched(NamedTuple):
    """A function of all rows at once -> [b], or Judged: a reward model, for one. Values that are not finite are its failures."""

    call: Callable[[Sequence[Row]], Any]


class Judged(NamedTuple):
    """values [b]; reasons {row: why it has none}; counts {what: how many of the rows}, logged as rewards/<name>/<what>."""

    values: Sequence[float]
    reasons: Mapping[int, str]
    counts: Mapping[str, int]


Reward = Callable[[Row], float] | External | Batched  # a plain callable must be bounded by itself: it runs in this process


class Scores(NamedTuple):
    """values float32 [b], nan where excluded; valid bool [b]; failures {name: excluded rows}; columns {name: float32 [b]};
    reasons {name: the first failure, with its row}; counts {name/what: rows}, of what a function counts itself."""

    values: np.ndarray
    valid: np.ndarray
    failures: dict[str, int]
    columns: dict[str, np.ndarray]
    reasons: dict[str, str]
    counts: dict[str, int]


def run(
    functions: Mapping[str, Reward], rows: Sequence[Row], *, seconds: float = 5.0, weights: Mapping[str, float] | None = None
) -> Scores:
    """Every function on every row, and their weighted sum (weights default to 1).

    A row on which any function raises, takes over `seconds`, or gives something that is not a finite number is excluded
    (valid False, values nan) and counted under that function: a failure is no reward of 0. UserError: weights of functions
    that are not there, or a user's file that does not load.
    """
    weights = check_weights(functions, weights)
    columns: dict[str, np.ndarray] = {}
    reasons: dict[str, str] = {}
    failures: dict[str, int] = {}
    counts: dict[str, int] = {}
    for name, function in functions.items():
        results, counted = _apply(function, rows, seconds)
        counts |= {f"{name}/{what}": int(n) for what, n in counted.items()}
        columns[name] = np.array([_finite(value) for value, _ in results], np.float32)
        # a value beyond float32 is infinite there
        columns[name][~np.isfinite(columns[name])] = np.nan
        bad = np.flatnonzero(np.isnan(columns[name]))
        failures[name] = len(bad)
        if len(bad):
            value, error = results[bad[0]]
            reasons[name] = f"row {bad[0] + 1}: {error or f'gave {str(value)[:60]}, which is no finite number'}"
    values = combine(columns, weights)
    return Scores(values, np.isfinite(values), failures, columns, reasons, counts)


def combine(columns: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """sum_i w_i r_i [b] as float32; nan where any r_i is, also with weight 0."""
    return np.sum([np.float64(weights[name]) * column for name, column in columns.items()], axis=0).astype(np.float32)


def check_weights(functions: Mapping[str, Reward], weights: Mapping[str, float] | None) -> dict[str, float]:
    """Weights of all functions, 1 where none is given. UserError: a weight without a function, or not finite."""
    if not functions:
        raise UserError("no reward function is given: name at least one")
    if unknown := set(weights or {}) - set(functions):
        raise UserError(f"weight of {sorted(unknown)[0]!r}: no such reward function; there are {', '.join(functions)}")
    full = {name: float((weights or {}).get(name, 1.0)) for name in functions}
    for name, weight in full.items():
        if not math.isfinite(weight):
            raise UserError(f"weight {weight} of the reward {name!r}: a finite number is needed")
    return full


def joined(parts: Sequence[Scores]) -> Scores:
    """The scores of several batches as those of one."""
    columns = {name: np.concatenate([p.columns[name] for p in parts]) for name in parts[0].columns}
    reasons = {name: reason for p in reversed(parts) for name, reason in p.reasons.items()}
    failures = {name: sum(p.failures[name] for p in parts) for name in columns}
    counts = {name: sum(p.counts[name] for p in parts) for name in parts[0].counts}
    return Scores(*(np.concatenate([p[i] for p in parts]) for i in range(2)), failures, columns, reasons, counts)


def describe(scores: Scores) -> list[str]:
    """One line for every function that failed: how often, and the first failure with its row."""
    rows = len(scores.values)
    return [
        f"reward {name!r} failed on {scores.failures[name]} of {rows} rows, which are left out (first: {reason})"
        for name, reason in scores.reasons.items()
    ]


def metrics(scores: Scores) -> dict[str, tuple[float, float]]:
    """{name: (sum, count)}: rewards/<name>/mean and /std over rows that have one, /failures, what it counts, rewards/excluded."""
    found: dict[str, tuple[float, float]] = {}
    for name, column in scores.columns.items():
        good = column[np.isfinite(column)].astype(np.float64)
        found[f"rewards/{name}/mean"] = (float(good.sum()), float(len(good)))
        found[f"rewards/{name}/std"] = (float(good.std(ddof=1)) if len(good) > 1 else 0.0, 1.0)
        found[f"rewards/{name}/failures"] = (float(scores.failures[name]), 1.0)
    found |= {f"rewards/{name}": (float(n), 1.0) for name, n in scores.counts.items()}
    return found | {"rewards/excluded": (float((~scores.valid).sum()), 1.0)}


# ---- calls

Result = tuple[Any, str]  # (value, "") or (None, what went wrong)


def _finite(value: Any) -> float:
    """The value as a float, nan unless it is a finite number (a bool counts as one; text and None do not)."""
    try:
        number = math.nan if value is None or isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def _apply(function: Reward, rows: Sequence[Row], seconds: float) -> tuple[list[Result], Mapping[str, int]]:
    """(a result a row, what the function counts)."""
    if isinstance(function, External):
        return _external(function, rows, seconds), {}
    if isinstance(function, Batched):
        return _batched(function, rows)
    return [_direct(function, row) for row in rows], {}


def _direct(function: Callable[[Row], float], row: Row) -> Result:
    try:
        return function(row), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _batched(function: Batched, rows: Sequence[Row]) -> tuple[list[Result], Mapping[str, int]]:
    """A batched function that raises is a bug of ours, not of a row: it is let through."""
    given = function.call(rows)
    values, reasons, counts = given if isinstance(given, Judged) else (given, {}, {})
    values = np.asarray(values, np.float32)
    if values.shape != (len(rows),):
        raise UserError(f"a batched reward gave an array of shape {values.shape} for {len(rows)} rows: one value a row is needed")
    return [(value, reasons.get(i, "")) for i, value in enumerate(values)], counts


def _external(function: External, rows: Sequence[Row], seconds: float) -> list[Result]:
    """One call a row in the function's worker; after HANGS late ones the rest is given up, so that a batch is bounded too."""
    results: list[Result] = []
    late = 0
    for row in rows:
        if late >= HANGS:
            results.append((None, f"not called after {late} calls over {seconds:g} seconds"))
            continue
        reply = _ask(function, {"row": row, "options": function.options}, seconds)
        late += reply.get("late", False)
        results.append((reply.get("value"), reply.get("error", "")))
    return results


# ---- workers: one process for each (source, name), kept from batch to batch

_workers: dict[tuple[str, str], subprocess.Popen] = {}
_lock = threading.RLock()


def _ask(function: External, request: Any, seconds: float) -> dict[str, Any]:
    """{"value"} or {"error"}; "late" when the call ran out of time. A worker that is late or gone is replaced next time."""
    try:
        line = json.dumps(request, default=str).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        return {"error": f"the row is no JSON value ({error})"}
    with _lock:
        worker = _worker(function)
        # a pipe holds 64 kB: read while writing
        threading.Thread(target=_write, args=(worker, line), daemon=True).start()
        return _read(worker, function, seconds)


def _worker(function: External) -> subprocess.Popen:
    """The running worker, or a new one that has loaded the function. UserError when it does not load."""
    key = function.source, function.name
    if key in _workers:
        return _workers[key]
    if function.source.endswith(".py") and not Path(function.source).is_file():
        raise UserError(f"{function.source}: no such file; a reward function is given as file.py:name")
    program = str(Path(__file__).with_name("worker.py"))
    # a session of its own, so that what it starts ends with it; no accelerator, which is training's
    _workers[key] = subprocess.Popen(
        [sys.executable, "-P", program, *key], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True, env={**os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    threading.Thread(target=_forward, args=(_workers[key].stderr,), daemon=True).start()
    if error := _read(_workers[key], function, STARTUP).get("error"):
        _end(key)
        raise UserError(f"{function.source}: the reward function {function.name!r} does not load: {error}")
    return _workers[key]


def _read(worker: subprocess.Popen, function: External, seconds: float) -> dict[str, Any]:
    data = bytearray()
    deadline = time.monotonic() + seconds
    while not data.endswith(b"\n"):
        left = deadline - time.monotonic()
        ready = left > 0 and select.select([worker.stdout], [], [], left)[0]
        block = worker.stdout.read1(1 << 16) if ready else b""
        if not block:
            _end((function.source, function.name))
            return {"error": "its process ended"} if ready else {"error": f"took over {seconds:g} seconds", "late": True}
        data += block
        if len(data) > LONGEST:
            _end((function.source, function.name))
            return {"error": f"its answer has more than {LONGEST} bytes"}
    try:
        return dict(json.loads(data))
    except (ValueError, TypeError, RecursionError):  # something else wrote where the answers go
        _end((function.source, function.name))
        return {"error": f"its answer is none: {bytes(data[:60])!r}"}


def _forward(printed: Any) -> None:
    """What a worker prints, to our stderr; beyond PRINTED bytes it is read and dropped, so that it neither blocks nor floods."""
    left = PRINTED
    while block := printed.read1(1 << 16):
        shown, left = block[:left].decode("utf-8", "replace"), left - len(block)
        with contextlib.suppress(OSError, ValueError):  # our stderr is gone
            sys.stderr.write(shown if left > 0 or not shown else f"{shown}\n(a reward function prints on: the rest is dropped)\n")
        left = max(0, left)


def _write(worker: subprocess.Popen, line: bytes) -> None:
    try:
        worker.stdin.write(line)
        worker.stdin.flush()
    except (OSError, ValueError):  # it was ended meanwhile
        return


def _end(key: tuple[str, str]) -> None:
    if (worker := _workers.pop(key, None)) is None:
        return
    try:
        os.killpg(worker.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        worker.kill()
    worker.wait()


def check(functions: Mapping[str, Reward]) -> None:
    """UserError now, not after the first rollout, when a user's function does not load."""
    for function in functions.values():
        if isinstance(function, External):
            with _lock:
                _worker(function)


def stop() -> None:
    """End all workers; they also end with this process."""
    for key in list(_workers):
        _end(key)


atexit.register(stop)
