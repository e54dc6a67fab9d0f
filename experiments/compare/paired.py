"""What a comparison of runs can say: paired tests where there are pairs, and in words where there are none."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from experiments.compare.record import Record, final, shared_metrics
from jaxllm.evals.stats import Interval, paired, sign_test

LEAST = 3  # seeds of an arm: Student's interval over 2 has no use


class Test(NamedTuple):
    """The second less the first. over: seeds, or prompts; p: of the sign test; proves: whether the interval is evidence."""

    name: str
    over: str
    difference: Interval
    p: float
    proves: bool = True


def arms_of(records: list[Record]) -> list[dict[Any, Record]]:
    """[{seed: run}, ...]: runs whose settings are the same but for the seed, in the order given."""
    arms: dict[str, dict[Any, Record]] = {}
    for r in records:
        same = json.dumps({k: v for k, v in r.config.items() if k != "seed"}, sort_keys=True, default=str)
        arms.setdefault(r.experiment + same, {}).setdefault(r.config.get("seed"), r)
    return list(arms.values())


def over_seeds(records: list[Record]) -> list[Test]:
    """Tests of two arms over the seeds that both have; [] when there are not two, or fewer than LEAST seeds."""
    arms = arms_of(records)
    if len(arms) != 2 or len(seeds := [s for s in arms[0] if s in arms[1]]) < LEAST:
        return []
    tests = []
    for name in shared_metrics(records):
        sides = [[final(arm[s], name) for s in seeds] for arm in arms]
        if None not in sides[0] + sides[1] and not name.startswith("perf/"):
            differences = [b - a for a, b in zip(*sides, strict=True)]
            tests.append(Test(name, f"{len(seeds)} seeds", paired(sides[1], sides[0]), sign_test(differences)))
    return tests


def _scored(record: Record) -> dict[str, dict[str, float]]:
    """{score: {prompt: its value}} of the samples of the last step that has any."""
    last = max((row["step"] for row in record.samples), default=0)
    rows = [row for row in record.samples if row["step"] == last]
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "prompt", "text") and isinstance(value, (int, float)):
                found.setdefault(name, {})[row["prompt"]] = float(value)
    return found


def over_prompts(a: Record, b: Record) -> list[Test]:
    """Tests over the prompts whose last samples both runs have scored."""
    one, two = _scored(a), _scored(b)
    tests = []
    for name in [n for n in one if n in two]:
        prompts = [p for p in one[name] if p in two[name]]
        if len(prompts) >= LEAST:
            x, y = ([side[name][p] for p in prompts] for side in (one, two))
            tests.append(
                Test(
                    f"samples: {name}",
                    f"{len(prompts)} prompts",
                    paired(y, x),
                    sign_test([j - i for i, j in zip(x, y, strict=True)]),
                )
            )
    return tests


def over_evals(a: Record, b: Record) -> list[Test]:
    """The mean difference over the evaluations that both made: it describes, and proves nothing."""
    tests = []
    for name in (n for n in shared_metrics([a, b]) if n.startswith("eval/")):
        sides = [dict(zip(*r.series.get(name, ((), ())), strict=True)) for r in (a, b)]
        steps = [s for s in sides[0] if s in sides[1]]
        if len(steps) >= LEAST:
            x, y = ([side[s] for s in steps] for side in sides)
            differences = [j - i for i, j in zip(x, y, strict=True)]
            tests.append(Test(name, f"{len(steps)} evaluations of one run", paired(y, x), sign_test(differences), proves=False))
    return tests


def tests_of(records: list[Record]) -> list[Test]:
    """Over seeds where runs are seeds of two arms; else, of two runs, over prompts and evaluations."""
    if found := over_seeds(records):
        return found
    return over_prompts(*records) + over_evals(*records) if len(records) == 2 else []


def conclusion(records: list[Record], tests: list[Test]) -> list[str]:
    """What can and what cannot be concluded."""
    arms = arms_of(records)
    if any(t.over.endswith("seeds") for t in tests):
        different = [t.name for t in tests if not t.difference.low <= 0 <= t.difference.high]
        said = f"Two settings over {tests[0].over}: " + (
            f"the difference is not explained by the seed in {', '.join(different[:6])}"
            if different
            else "no metric differs by more than the seeds do"
        )
        many = len(tests) > 1
        return [said + (f". {len(tests)} metrics were tested: at 95 % one in twenty differs by chance" if many else "")]
    lines = []
    if len(arms) == 1:
        lines.append("All runs have the same settings but for the seed: their spread is what a seed does, and nothing else.")
    else:
        counts = " and ".join(str(len(arm)) for arm in arms[:4])
        lines.append(
            f"There are {counts} seeds of {len(arms)} settings: a difference may be the seed's, and nothing is proved. "
            f"Run two settings with the same {LEAST} seeds or more (--config.seed=1, 2, ...) and give all of the runs."
        )
    if any(t.over.endswith("prompts") for t in tests):
        lines.append("Over prompts, the test speaks of these two models on these prompts, not of the settings that made them.")
    if any(not t.proves for t in tests):
        lines.append(
            "Evaluations of one run depend on each other: their mean difference describes the curves and proves nothing."
        )
    return lines


def notes(records: list[Record]) -> list[str]:
    """What makes a comparison lame."""
    lines = []
    if len({r.experiment for r in records}) > 1:
        kinds = ", ".join(dict.fromkeys(r.experiment for r in records))
        lines.append(f"The runs are of different experiments ({kinds}): equal names may mean different things.")
    known = [r.data for r in records]
    if all(known):
        lines.append(
            "All runs trained on the same rows."
            if len(set(known)) == 1
            else "The runs trained on different rows: their data fingerprints differ."
        )
    else:
        lines.append("Whether the runs trained on the same rows is unknown: not all have a checkpoint.")
    if len({str(r.env.get("git")) for r in records}) > 1:
        lines.append("The runs are of different commits.")
    if unfinished := [r.name for r in records if not r.finished]:
        lines.append(f"Not finished: {', '.join(unfinished)}.")
    return lines
