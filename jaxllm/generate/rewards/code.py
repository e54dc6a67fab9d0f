"""Programs as answers: a completion's code is run on a row's inputs, and its outputs are compared here.

The expected outputs stay in this process, so there is nothing for a program to read, patch or print its way past: the only
thing that scores is the right output for every input. (Right for these inputs: a program that knows them by heart scores too.)
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from jaxllm.core.types import UserError
from jaxllm.generate.rewards.combine import Batched, Judged
from jaxllm.generate.sandbox.runner import CodeRunner

LONGEST = 50_000  # characters of a completion's code
WORKERS = 8
FENCE = re.compile(r"^```([^`\n]*)$", re.MULTILINE)
PYTHON = ("", "python", "py", "python3")  # what may stand behind the fence that opens a program


class Verdict(NamedTuple):
    """value: 1.0 passed, 0.0 not, None where our machinery failed; what: "passed", "wrong", "timeouts" or "failures"."""

    value: float | None
    what: str
    reason: str = ""


def reward(runner: CodeRunner, *, workers: int = WORKERS) -> Batched:
    """1 where a completion's program passes all tests of its row, 0 where not, excluded where it could not be run.

    A program that runs out of time has 0 and is counted (rewards/<name>/timeouts); several run at once.
    """
    workers = min(workers, os.cpu_count() or 1)

    def call(rows: Sequence[Mapping[str, Any]]) -> Judged:
        with ThreadPoolExecutor(workers) as pool:
            found = list(pool.map(lambda row: judge(runner, row), rows))
        reasons = {i: v.reason for i, v in enumerate(found) if v.value is None}
        values = [math.nan if v.value is None else v.value for v in found]
        return Judged(values, reasons, {"timeouts": Counter(v.what for v in found)["timeouts"]})

    return Batched(call)


def judge(runner: CodeRunner, row: Mapping[str, Any]) -> Verdict:
    """One completion against the row's tests (see `check_tests`)."""
    source = extract(row["completion"])
    if len(source) > LONGEST:
        return Verdict(0.0, "wrong", f"the program has over {LONGEST:,} characters")
    return _calls(runner, source, row) if row.get("function") else _programs(runner, source, row["tests"])


def extract(completion: str) -> str:
    """The last fenced block of Python, else the whole text."""
    found, opened = completion, None
    for fence in FENCE.finditer(completion):
        word = fence[1].strip().lower()
        if opened is None:
            opened = fence
        elif not word:
            found = completion[opened.end() + 1 : fence.start()] if opened[1].strip().lower() in PYTHON else found
            opened = None
    return found


def check_tests(row: Mapping[str, Any], where: str) -> None:
    """UserError unless the row has `tests`: [{"input", "output"}, ...], of any JSON with `function`, of text without.

    With `function` an input is its list of arguments, or its one argument; without, what the program reads from stdin.
    """
    tests, function = row.get("tests"), row.get("function")
    if not isinstance(tests, list) or not tests:
        raise UserError(f'{where}: `tests` must be a list of {{"input", "output"}} with at least one, as the reward code needs')
    if function is not None and not (isinstance(function, str) and function.isidentifier()):
        raise UserError(f"{where}: `function` is {str(function)[:40]!r}: give the name of the function to call, or leave it out")
    for i, test in enumerate(tests):
        if not isinstance(test, Mapping) or not {"input", "output"} <= test.keys():
            raise UserError(f'{where}: test {i + 1} must be {{"input": ..., "output": ...}}, not {str(test)[:60]}')
        if function is None and not all(isinstance(test[name], str) for name in ("input", "output")):
            raise UserError(f"{where}: test {i + 1} of a program needs text as input and output; to call one, give `function`")


# ---- running


def _calls(runner: CodeRunner, source: str, row: Mapping[str, Any]) -> Verdict:
    tests = row["tests"]
    outcome = runner.call(source, row["function"], [test["input"] for test in tests])
    if outcome.kind != "ended":
        return _ended_early(outcome)
    for i, ((value, error), test) in enumerate(zip(outcome.values, tests, strict=True)):
        if error or not same(value, test["output"]):
            return Verdict(0.0, "wrong", f"test {i + 1}: {error or 'another output'}")
    return Verdict(1.0, "passed")


def _programs(runner: CodeRunner, source: str, tests: Sequence[Mapping[str, str]]) -> Verdict:
    """One fresh process a test, up to the first that fails."""
    for i, test in enumerate(tests):
        outcome = runner.program(source, test["input"])
        if outcome.kind != "ended":
            return _ended_early(outcome)
        if outcome.code != 0 or _lines(outcome.stdout) != _lines(test["output"]):
            return Verdict(0.0, "wrong", f"test {i + 1}: exit code {outcome.code}, or another output")
    return Verdict(1.0, "passed")


def _ended_early(outcome: Any) -> Verdict:
    if outcome.kind == "failure":
        return Verdict(None, "failures", outcome.reason)
    return Verdict(0.0, "timeouts" if outcome.kind == "timeout" else "wrong", outcome.reason)


def _lines(text: str) -> list[str]:
    """Lines without white space at their ends, and without empty lines at the text's."""
    return [line.rstrip() for line in text.strip().split("\n")]


def same(got: Any, want: Any) -> bool:
    """Whether a JSON value is the expected one: floats to 1e-9, integers exactly, true is not 1, lists in order."""
    if isinstance(want, list):
        return isinstance(got, list) and len(got) == len(want) and all(map(same, got, want))
    if isinstance(want, Mapping):
        return isinstance(got, dict) and got.keys() == want.keys() and all(same(got[k], want[k]) for k in want)
    if isinstance(want, float) and type(got) in (int, float):
        return abs(got) < 1e308 and math.isclose(got, want, rel_tol=1e-9, abs_tol=1e-12)
    return (type(got) is type(want) or {type(got), type(want)} == {int, float}) and got == want
