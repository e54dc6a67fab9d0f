"""Measure this library against others doing the same work: python -m benchmarks --out=FILE [name ...]

FILE gets a JSON list of rows {"name", "ratio", "low", "high", "must", "better"}, all measured in this run. The contenders
take turns (A B C A B C ...), `ratio` is the median over rounds of our throughput over theirs within a round, and low and high
are the quartiles over rounds. `must` is null where a row is only reported; a contender that is not installed has null figures.
Every contender starts from the same weights: equal parameter counts, equal losses (1e-3 after five steps) or equal
tokens are checked before anything is timed. The table adds absolute figures, for information only.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.children import interleave, started
from benchmarks.shape import Shape


class Rival(NamedTuple):
    """One row: who does the same work, and what must hold."""

    target: str  # module:function
    must: float | None
    needs: tuple[str, ...] = ()  # packages


OURS = {"train_step": "benchmarks.ours:train_step", "generate": "benchmarks.ours:generate"}
RIVALS = {
    "train_step/hand_written_jax": Rival("benchmarks.hand_written:train_step", 0.97),
    "train_step/torch_eager": Rival("benchmarks.torch_eager:train_step", None, ("torch",)),
    "generate/transformers": Rival("benchmarks.hugging_face:generate", 2.0, ("torch", "transformers")),
}


def check(name: str, ours: dict, theirs: dict, shape: Shape) -> None:
    """Raises AssertionError unless both did the same work."""
    assert ours["parameters"] == theirs["parameters"], f"{name}: {ours['parameters']} and {theirs['parameters']} parameters"
    if "losses" in ours:
        gap = max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True))
        assert gap < 1e-3, f"{name}: losses {ours['losses']} and {theirs['losses']}"
        print(f"{name}: {ours['parameters']:,} parameters, losses equal within {gap:.1e}")
    else:
        pairs = [(a, b) for x, y in zip(ours["tokens"], theirs["tokens"], strict=True) for a, b in zip(x, y, strict=True)]
        equal = sum(a == b for a, b in pairs) / len(pairs)
        assert equal > 0.9, f"{name}: only {equal:.0%} of the tokens agree"  # rounding may flip a near tie
        print(f"{name}: {len(pairs)} tokens, {equal:.1%} of them equal")


def row(name: str, ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """The JSON row of a rival, from the seconds of every round (none: not installed)."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)] if theirs else []
    low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive") if ratios else (None, None, None)
    return {"name": name, "ratio": ratio, "low": low, "high": high, "must": RIVALS[name].must, "better": "more"}


def measure(kind: str, names: list[str], shape: Shape, rounds: int) -> list[dict[str, Any]]:
    """The rows of one kind of work, its contenders interleaved."""
    installed = [n for n in names if all(importlib.util.find_spec(package) for package in RIVALS[n].needs)]
    seconds: dict[str, list[float]] = {}
    if installed:
        with started([OURS[kind], *(RIVALS[n].target for n in installed)], shape) as (connections, facts):
            for name, theirs in zip(installed, facts[1:], strict=True):
                check(name, facts[0], theirs, shape)
            times = shape.steps if kind == "train_step" else 1
            columns = list(zip(*interleave(connections, times, rounds), strict=True))
        seconds = dict(zip(["ours", *installed], map(list, columns), strict=True))
        tokens = shape.batch * shape.length * times if kind == "train_step" else shape.rows * shape.new_tokens
        for name, times_taken in seconds.items():
            median, best = statistics.median(times_taken), min(times_taken)
            print(f"  {kind:12} {name:30} {median:7.3f} s (best {best:.3f}), {tokens / median:7.0f} tokens/s")
    return [row(n, seconds.get("ours", []) if n in installed else [], seconds.get(n, [])) for n in names]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [f"{'name':30} {'ratio':>7} {'quartiles':>15} {'must':>6}"]
    for r in rows:
        figures = f"{r['ratio']:7.3f} {r['low']:7.3f}-{r['high']:.3f}" if r["ratio"] else f"{'not installed':>23}"
        verdict = "" if r["must"] is None or r["ratio"] is None else "holds" if r["ratio"] >= r["must"] else "FAILS"
        lines.append(f"{r['name']:30} {figures} {r['must'] or '-':>6} {verdict}")
    return "\n".join(lines)


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name", help=f"rows to measure, by default all: {', '.join(RIVALS)}")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--rounds", type=int, default=9)
    for field in ("batch", "heads", "steps"):
        parser.add_argument(f"--{field}", type=int, default=getattr(Shape, field))
    args = parser.parse_args()
    if unknown := sorted(set(args.names) - set(RIVALS)):
        parser.error(f"unknown name {unknown[0]!r}: choose from {', '.join(RIVALS)}")
    shape = Shape(batch=args.batch, heads=args.heads, steps=args.steps)
    print("settings:", ", ".join(f"{k} {v}" for k, v in dataclasses.asdict(shape).items()), f", rounds {args.rounds}", sep=" ")
    print(f"{os.cpu_count()} CPUs, load average {' '.join(f'{x:.1f}' for x in os.getloadavg())}")
    rows = []
    for kind in OURS:
        if names := [n for n in RIVALS if n.startswith(f"{kind}/") and (not args.names or n in args.names)]:
            rows += measure(kind, names, shape, args.rounds)
    print(f"load average at the end {' '.join(f'{x:.1f}' for x in os.getloadavg())}")
    print(table(rows))
    args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
