"""Measure this library against others doing the same work: python -m benchmarks --out=FILE [name ...]

FILE gets a JSON list of rows {"name", "ratio", "low", "high", "must", "better"}, all measured in this
run. The contenders take turns (A B C A B C ...); `ratio` is the median over rounds of our throughput over
theirs within a round (of our seconds over theirs where `better` is "less"), `low` and `high` are its
quartiles over rounds. `must` is null where a row is only reported; a contender that is not installed has
null figures. All but moe_step start from the same weights: equal parameter
counts, equal losses (within 1e-3 after five steps) or equal tokens are checked before anything
is timed. The table adds the absolute figures, for information only: on a busy machine best times and CPU
seconds say more than medians, and contenders whose threads wait for each other in lock step (OpenMP) lose
most; `taskset -c 0` gives every contender one thread.

moe_step/dense is the one row where less is better: the seconds of a step with experts over those of the dense model
of equal active FLOPs.

dpo_step/... and grpo_iteration/... are TRL's trainers; grpo_iteration/outside is the share of our own iteration that is neither
rollout nor update. Ours has the reference's log-probabilities of DPO as columns made beforehand: dpo_step/trl is TRL as it comes,
with the reference's forward pass in every step, dpo_step/trl_precomputed has them made beforehand too.

generate/... has our rows over one simulated device a core (`decode.over_data`), as the other side uses every core;
generate_one_device/... has them on one.
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
    better: str = "more"


OURS = {name: f"benchmarks.ours:{name}" for name in ("train_step", "generate", "generate_one_device")}
OURS["moe_step"] = "benchmarks.moe:sparse"
OURS |= {name: f"benchmarks.alignment:{name}" for name in ("dpo_step", "grpo_iteration")}
TRL = ("torch", "transformers", "trl")
RIVALS = {
    "train_step/hand_written_jax": Rival("benchmarks.hand_written:train_step", 0.97),
    "train_step/hand_written_jax_logsumexp": Rival("benchmarks.hand_written:train_step_logsumexp", None),
    "train_step/torch_eager": Rival("benchmarks.torch_eager:train_step", None, ("torch",)),
    "generate/transformers": Rival("benchmarks.hugging_face:generate", 2.0, ("torch", "transformers")),
    "generate_one_device/transformers": Rival("benchmarks.hugging_face:generate", None, ("torch", "transformers")),
    "dpo_step/trl": Rival("benchmarks.trl_trainers:dpo_step", 1.1, TRL),
    "dpo_step/trl_precomputed": Rival("benchmarks.trl_trainers:dpo_step_precomputed", None, TRL),
    "grpo_iteration/trl": Rival("benchmarks.trl_trainers:grpo_iteration", 1.7, TRL),
    "moe_step/dense": Rival("benchmarks.moe:dense", 1.25, better="less"),
}

OUTSIDE = 0.05  # of a GRPO iteration: the most that may go by between generation and training


def check(name: str, ours: dict, theirs: dict) -> None:
    """Raises AssertionError unless both did the same work."""
    if "flops" in ours:
        assert abs(ours["flops"] / theirs["flops"] - 1) < 0.01, f"{name}: {ours['flops']} and {theirs['flops']} FLOPs a step"
        print(
            f"{name}: {ours['parameters']:,} and {theirs['parameters']:,} parameters, {theirs['flops'] / 1e9:.1f} GFLOPs a step"
        )
        return
    counts = ours["parameters"], theirs["parameters"]
    assert counts[0] == counts[1], f"{name}: {counts[0]} and {counts[1]} parameters"
    if "losses" in ours:
        gap = max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True))
        assert gap < 1e-3, f"{name}: losses {ours['losses']} and {theirs['losses']}"
        print(f"{name}: {ours['parameters']:,} parameters, losses equal within {gap:.1e}")
    elif "completions" in ours:
        work = [(facts["completions"], facts["trained"]) for facts in (ours, theirs)]
        assert work[0] == work[1], f"{name}: (completions, sampled tokens) {work[0]} and {work[1]}"
        print(f"{name}: {counts[0]:,} parameters, {work[0][0]} completions, {work[0][1]} sampled tokens an iteration")
    else:
        ours_flat, theirs_flat = (sum(facts["tokens"], []) for facts in (ours, theirs))
        equal = sum(a == b for a, b in zip(ours_flat, theirs_flat, strict=True)) / len(ours_flat)
        assert equal > 0.9, f"{name}: only {equal:.0%} of the tokens agree"  # rounding may flip a near tie
        print(f"{name}: {len(ours_flat)} tokens, {equal:.1%} of them equal")


def row(name: str, ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """The JSON row of a rival, from the seconds of every round (none: not installed)."""
    low = ratio = high = None
    if theirs:
        pairs = zip(ours, theirs, strict=True)
        ratios = [b / a if RIVALS[name].better == "more" else a / b for a, b in pairs]
        low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
    rival = RIVALS[name]
    return {"name": name, "ratio": ratio, "low": low, "high": high, "must": rival.must, "better": rival.better}


def measure(kind: str, names: list[str], shape: Shape, rounds: int) -> list[dict[str, Any]]:
    """The rows of one kind of work, its contenders interleaved."""
    installed = [n for n in names if all(importlib.util.find_spec(package) for package in RIVALS[n].needs)]
    if not installed:
        return [row(n, [], []) for n in names]
    times = shape.steps if kind.endswith("step") else 1
    with started([OURS[kind], *(RIVALS[n].target for n in installed)], shape) as (connections, facts):
        for name, theirs in zip(installed, facts[1:], strict=True):
            check(name, facts[0], theirs)
        columns = zip(*interleave(connections, times, rounds), strict=True)
    seconds = {}
    trained = facts[0].get("trained", shape.batch * shape.length)
    tokens = times * (shape.rows * shape.new_tokens if kind.startswith("generate") else trained)
    for name, column in zip([f"{kind}/ours", *installed], columns, strict=True):
        wall, cpu = zip(*column, strict=True)
        seconds[name] = list(wall)
        median, rate = statistics.median(wall), tokens / statistics.median(wall)
        spent = f"{median:7.3f} s, best {min(wall):6.3f}, CPU {statistics.median(cpu):6.3f}"
        print(f"  {name:38} {spent}; {rate:6.0f} tokens/s", flush=True)
    rows = [row(n, seconds[f"{kind}/ours"], seconds.get(n, [])) for n in names]
    return rows + ([share(f"{kind}/outside", facts[0]["outside"])] if "outside" in facts[0] else [])


def share(name: str, values: list[float]) -> dict[str, Any]:
    """The JSON row of what part of our own iteration is neither generation nor training."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"name": name, "ratio": middle, "low": low, "high": high, "must": OUTSIDE, "better": "less"}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [f"{'name':38} {'ratio':>7} {'quartiles':>15} {'must':>6}"]
    for r in rows:
        if r["ratio"] is None:
            lines.append(f"{r['name']:38} {'not installed':>23}")
            continue
        holds = r["must"] is None or (r["ratio"] >= r["must"] if r["better"] == "more" else r["ratio"] <= r["must"])
        verdict = "reported" if r["must"] is None else "holds" if holds else "FAILS"
        quartiles = f"{r['low']:.3f}-{r['high']:.3f}"
        lines.append(f"{r['name']:38} {r['ratio']:7.3f} {quartiles:>15} {r['must'] or '-':>6} {verdict}")
    return "\n".join(lines)


def load() -> str:
    """The load average of the last minutes."""
    return f"{os.cpu_count()} CPUs, load average " + " ".join(f"{x:.1f}" for x in os.getloadavg())


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name", help=f"rows to measure (default: all): {', '.join(RIVALS)}")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--rounds", type=int, default=9)
    for field in ("batch", "heads", "steps"):
        parser.add_argument(f"--{field}", type=int, default=getattr(Shape, field))
    args = parser.parse_args()
    if unknown := sorted(set(args.names) - set(RIVALS)):
        parser.error(f"unknown name {unknown[0]!r}: choose from {', '.join(RIVALS)}")
    shape = Shape(batch=args.batch, heads=args.heads, steps=args.steps)
    settings = {**dataclasses.asdict(shape), "rounds": args.rounds}
    print("settings:", ", ".join(f"{k} {v}" for k, v in settings.items()))
    print(load(), flush=True)
    rows = []
    for kind in OURS:
        if names := [n for n in RIVALS if n.startswith(f"{kind}/") and (not args.names or n in args.names)]:
            rows += measure(kind, names, shape, args.rounds)
    print(f"{load()}\n\n{table(rows)}")
    args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
