"""A comparison in words: what its tests show, what they do not, and what makes it lame."""

from __future__ import annotations

import math

from experiments.compare.paired import ALPHA, LEAST, Test, arms_of, shared_seeds, untested
from experiments.compare.record import Record, final, last_step, missing_metrics, shared_metrics

MOST = 6  # names in a line


def some(names: list[str]) -> str:
    """Names, the first few of many."""
    return ", ".join(names[:MOST]) + (f" and {len(names) - MOST} more" if len(names) > MOST else "")


def conclusion(records: list[Record], tests: list[Test]) -> list[str]:
    """What can and what cannot be concluded."""
    if shared_seeds(records):
        return _of_seeds(records, tests)
    arms, lines = arms_of(records), []
    if len(arms) == 1:
        lines.append("All runs have the same settings but for the seed: their spread is what a seed does, and nothing else.")
    else:
        counts = " and ".join(str(len(arm)) for arm in arms[:4]) + " and more" * (len(arms) > 4)
        lines.append(
            f"{len(arms)} settings with {counts} seeds: a difference may be the seed's, and nothing is proved. "
            f"Run two settings with the same {LEAST} seeds or more (--config.seed=1, 2, ...) and give all of the runs."
        )
    if any(t.over.endswith("prompts") for t in tests):
        lines.append(
            "Over prompts, the sign test speaks of these two models on these prompts, not of the settings that made them."
        )
    if any(math.isnan(t.p) for t in tests):
        lines.append(
            "Evaluations of one run depend on each other: their mean difference describes the curves and proves nothing."
        )
    return lines


def _of_seeds(records: list[Record], tests: list[Test]) -> list[str]:
    """Two arms over seeds: what holds when all metrics are tested at once, and what would alone."""
    holds = [t.name for t in tests if t.adjusted < ALPHA]
    alone = [t.name for t in tests if t.p < ALPHA <= t.adjusted]
    said = f"the difference is not explained by the seed in {some(holds)}" if holds else "no metric differs by more than seeds do"
    lines = [f"Two settings over {len(shared_seeds(records))} seeds: {said}."]
    if tests:
        lines[0] += (
            f" Student's paired test of {len(tests)} metrics, with Holm's correction for so many; it takes differences to be "
            "about normal, which so few seeds cannot show."
        )
    if alone:
        lines.append(
            f"Tested alone {len(alone)} more would: {some(alone)}. One metric in twenty does so by chance: if one of them "
            "was the question before the runs were made, its own p counts."
        )
    if same := untested(records):
        lines.append(f"Not tested, the difference is the same in every seed: {some(same)}.")
    return lines


def notes(records: list[Record]) -> list[str]:
    """What makes a comparison lame."""
    lines = []
    if len({r.experiment for r in records}) > 1:
        kinds = ", ".join(dict.fromkeys(r.experiment for r in records))
        lines.append(f"The runs are of different experiments ({kinds}): equal names may mean different things.")
    if len(steps := {last_step(r) for r in records}) > 1:
        several = " and ".join(f"{n:,}" for n in sorted(steps)[:4])
        lines.append(f"The runs are not of one length ({several} steps): their values at the end are not of the same step.")
    if bad := [f"{n} of {r.name}" for n in shared_metrics(records) for r in records if not math.isfinite(final(r, n))]:
        lines.append(f"Not finite at the end: {some(bad)}.")
    if missing := missing_metrics(records):
        lines.append(f"Left out, as not all runs have them: {some(missing)}.")
    lines.append(_rows(records))
    if len({str(r.env.get("git")) for r in records}) > 1:
        lines.append("The runs are of different commits.")
    if unfinished := [r.name for r in records if not r.finished]:
        lines.append(f"Not finished: {', '.join(unfinished)}.")
    kept = [id(r) for arm in arms_of(records) for r in arm.values()]
    if again := [r.name for r in records if id(r) not in kept]:
        lines.append(f"Counted once, as settings and seed are those of a run before: {some(again)}.")
    return lines


def _rows(records: list[Record]) -> str:
    if not all(r.data for r in records):
        return "Whether the runs trained on the same rows is unknown: not all have a checkpoint."
    if len({r.data for r in records}) == 1:
        return "All runs trained on the same rows."
    split = " (the seed also says which are held out)" if len({r.config.get("seed") for r in records}) > 1 else ""
    return f"The runs trained on different rows{split}: their data fingerprints differ."
