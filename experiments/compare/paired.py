"""What a comparison of runs can say: paired tests where there are pairs, and in words where there are none."""

from __future__ import annotations

import json
import math
from statistics import fmean
from typing import Any, NamedTuple

from experiments.compare.record import Record, final, shared_metrics
from jaxllm.evals.stats import Interval, holm, paired, sign_test, t_test
from jaxllm.report.resume import RESUMABLE

LEAST = 3  # seeds of an arm, and prompts: Student's interval over 2 has no use
ALPHA = 0.05


class Test(NamedTuple):
    """The second less the first. over: seeds, prompts or evaluations; p: nan where nothing can be tested; adjusted: by Holm."""

    name: str
    over: str
    difference: Interval
    p: float = math.nan
    adjusted: float = math.nan


def _adjusted(tests: list[Test]) -> list[Test]:
    """Tests of one family with Holm's p."""
    return [t._replace(adjusted=p) for t, p in zip(tests, holm(t.p for t in tests), strict=True)]


def arms_of(records: list[Record]) -> list[dict[Any, Record]]:
    """[{seed: run}, ...]: runs whose settings are the same but for the seed, in the order given; of a seed the first run."""
    arms: dict[str, dict[Any, Record]] = {}
    for r in records:
        same = {k: v for k, v in r.config.items() if k != "seed" and k not in RESUMABLE}
        arm = r.experiment + json.dumps(same, sort_keys=True, default=str)
        arms.setdefault(arm, {}).setdefault(r.config.get("seed"), r)
    return list(arms.values())


def shared_seeds(records: list[Record]) -> list[Any]:
    """The seeds that both of two arms have; [] when there are not two, or fewer than LEAST such seeds."""
    arms = arms_of(records)
    seeds = [s for s in arms[0] if s in arms[1]] if len(arms) == 2 else []
    return seeds if len(seeds) >= LEAST else []


def _of_both(records: list[Record]) -> dict[str, tuple[list[float], list[float]]]:
    """{metric: its values at the end in both arms, seed by seed}."""
    seeds = shared_seeds(records)
    names = [n for n in shared_metrics(records) if not n.startswith("perf/")] if seeds else []
    return {n: tuple([final(arm[s], n) for s in seeds] for arm in arms_of(records)) for n in names}


def over_seeds(records: list[Record]) -> list[Test]:
    """Student's paired tests of two arms over their shared seeds, a family; [] without such seeds.

    A metric that is not finite somewhere, or whose difference is the same in every seed, has no spread to be tested against.
    """
    over = f"{len(shared_seeds(records))} seeds"
    found = [Test(name, over, paired(b, a), t_test(_less(b, a))) for name, (a, b) in _of_both(records).items()]
    return _adjusted([t for t in found if not math.isnan(t.p)])


def untested(records: list[Record]) -> list[str]:
    """The metrics whose difference is the same in every shared seed, and not 0."""
    differences = {name: _less(b, a) for name, (a, b) in _of_both(records).items()}
    return [n for n, d in differences.items() if math.isnan(t_test(d)) and math.isfinite(sum(d)) and any(d)]


def _less(b: list[float], a: list[float]) -> list[float]:
    return [y - x for x, y in zip(a, b, strict=True)]


def _scored(record: Record) -> dict[str, dict[str, float]]:
    """{score: {prompt: its mean}} of the samples of the last step that has any; stages of a run apart."""
    last = max((row["step"] for row in record.samples), default=0)
    found: dict[str, dict[str, list[float]]] = {}
    for row in record.samples:
        stage = f" of {row['stage']}" if row.get("stage") else ""
        for name, value in row.items() if row["step"] == last else ():
            if name not in ("step", "prompt", "text") and isinstance(value, (int, float)):
                found.setdefault(name + stage, {}).setdefault(row["prompt"], []).append(float(value))
    return {name: {prompt: fmean(values) for prompt, values in rows.items()} for name, rows in found.items()}


def over_prompts(a: Record, b: Record) -> list[Test]:
    """Sign tests, which ask nothing of the scores' distribution, over the prompts whose last samples both runs have scored."""
    one, two = _scored(a), _scored(b)
    tests = []
    for name in [n for n in one if n in two]:
        prompts = [p for p in one[name] if p in two[name]]
        if len(prompts) >= LEAST:
            x, y = ([side[name][p] for p in prompts] for side in (one, two))
            tests.append(Test(f"samples: {name}", f"{len(prompts)} prompts", paired(y, x), sign_test(_less(y, x))))
    return _adjusted(tests)


def over_evals(a: Record, b: Record) -> list[Test]:
    """The mean difference over the evaluations that both made, without an interval: it describes, and proves nothing."""
    tests = []
    for name in (n for n in shared_metrics([a, b]) if n.startswith("eval/")):
        sides = [dict(zip(*r.series.get(name, ((), ())), strict=True)) for r in (a, b)]
        both = [(sides[0][s], sides[1][s]) for s in sides[0] if s in sides[1]]
        differences = [y - x for x, y in both if math.isfinite(y - x)]
        if len(differences) >= LEAST:
            mean = Interval(fmean(differences), math.nan, math.nan, len(differences))
            tests.append(Test(name, f"{len(differences)} evaluations of one run", mean))
    return tests


def tests_of(records: list[Record]) -> list[Test]:
    """Over seeds where runs are seeds of two arms; else, of two runs, over prompts and evaluations."""
    if shared_seeds(records):
        return over_seeds(records)
    return over_prompts(*records) + over_evals(*records) if len(records) == 2 else []
