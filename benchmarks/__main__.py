"""Measure this library against others doing the same work: python -m benchmarks --out=FILE [name ...]

FILE gets a JSON list of rows {"name", "ratio", "low", "high", "must", "better"}, all measured in this run. The contenders take
turns (A B C A B C ...); `ratio` is the median over rounds of our throughput over theirs within a round (of our seconds, bytes or
memory over theirs where `better` is "less"), `low` and `high` are its quartiles over rounds. `must` is null where a row is only
reported; figures are null where nothing was measured: a contender that is not installed, no H200. Contenders start from the same
weights: equal parameter counts, equal losses (within 1e-3 after five steps), equal tokens or equal FLOPs are checked before
anything is timed. The table adds the absolute figures, for information only: on a busy machine best times and CPU seconds
say more than medians, and contenders whose threads wait for each other in lock step (OpenMP) lose most; `taskset -c 0` gives
every contender one thread.

train_step/products_jax and /products_torch are the ceiling: the step's matrix products and nothing else, attention's as whole
squares, so the ratio is the share of that ceiling. moe_step/dense: the seconds of a step with experts over those of the dense
model of equal active FLOPs.

dpo_step/... and grpo_iteration/... are TRL's trainers; grpo_iteration/outside is the share of our own iteration that is neither
rollout nor update. Ours has the reference's log-probabilities of DPO as columns made beforehand: dpo_step/trl is TRL as it comes,
with the reference's forward pass in every step, dpo_step/trl_precomputed has them made beforehand too.

generate/... has our rows over one simulated device a core (`decode.over_data`), as the other side uses every core;
generate_one_device/... has them on one.

loss_memory and loss_step: the loss with its gradients at a vocabulary of 128k. first_step/trl, second_start/first and import/...:
whole processes, from start to end; second_compile/first only what the compilation cache saves, tracing and compiling the step.
loader/synthetic: the train loop on the loader's batches against one batch that stays on the device. plan/collective_bytes: what a
device receives in a step compiled for 16 v5e chips (needs libtpu), over what its sharding needs at least; plan_simulated/...: for
simulated CPU devices. h200/...: see `gpu`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
from pathlib import Path
from typing import Any

from benchmarks import rows as row_tables
from benchmarks.children import ask, interleave, started
from benchmarks.rows import NAMES, OURS, OUTSIDE, PROBES, RIVALS, Probe, installed
from benchmarks.shape import Shape


def check(name: str, ours: dict, theirs: dict) -> None:
    """Raises AssertionError unless both did the same work."""
    if "flops" in theirs:
        assert abs(ours["flops"] / theirs["flops"] - 1) < 0.01, f"{name}: {ours['flops']} and {theirs['flops']} FLOPs a step"
        print(f"{name}: {theirs['flops'] / 1e9:.1f} GFLOPs a step, of ours and theirs")
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


def measure(kind: str, names: list[str], shape: Shape, rounds: int) -> list[dict[str, Any]]:
    """The rows of one kind of work, its contenders interleaved."""
    here = [n for n in names if installed(RIVALS[n].needs)]
    if not here:
        return [row_tables.row(n, [], []) for n in names]
    times = shape.steps if kind.endswith("step") else 1
    with started([OURS[kind], *(RIVALS[n].target for n in here)], shape) as (connections, facts):
        for name, theirs in zip(here, facts[1:], strict=True):
            check(name, facts[0], theirs)
        columns = zip(*interleave(connections, times, rounds), strict=True)
    seconds = {}
    trained = facts[0].get("trained", shape.batch * shape.length)
    tokens = times * (shape.rows * shape.new_tokens if kind.startswith("generate") else trained)
    for name, column in zip([f"{kind}/ours", *here], columns, strict=True):
        wall, cpu = zip(*column, strict=True)
        seconds[name] = list(wall)
        median, rate = statistics.median(wall), tokens / statistics.median(wall)
        spent = f"{median:7.3f} s, best {min(wall):6.3f}, CPU {statistics.median(cpu):6.3f}"
        print(f"  {name:38} {spent}; {rate:6.0f} tokens/s", flush=True)
    rows = [row_tables.row(n, seconds[f"{kind}/ours"], seconds.get(n, [])) for n in names]
    outside = facts[0].get("outside")
    return rows + ([row_tables.of_values(f"{kind}/outside", outside, OUTSIDE, "less")] if outside else [])


def probe(name: str, given: Probe, names: list[str], shape: Shape, rounds: int) -> list[dict[str, Any]]:
    """The rows that one child measures by itself."""
    print(f"{name}:", flush=True)
    values = ask(given.target, shape, rounds) if installed(given.needs) else {}
    rows = [row_tables.of_values(n, values.get(n, []), given.rows[n], given.better) for n in names]
    print("\n".join(f"  {r['name']:38} {'not measured' if r['ratio'] is None else format(r['ratio'], '.3f')}" for r in rows))
    return rows


def load() -> str:
    """The load average of the last minutes."""
    return f"{os.cpu_count()} CPUs, load average " + " ".join(f"{x:.1f}" for x in os.getloadavg())


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name", help=f"rows to measure (default: most): {', '.join(NAMES)}")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--all", action="store_true", help="also rows that take minutes to compile (torch_compiled)")
    for field in dataclasses.fields(Shape):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    args = parser.parse_args()
    if unknown := sorted(set(args.names) - set(NAMES)):
        parser.error(f"unknown name {unknown[0]!r}: choose from {', '.join(NAMES)}")
    return args


def main() -> None:
    """Parse, measure, print, write."""
    args = parse()
    shape = Shape(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Shape)})
    settings = {**dataclasses.asdict(shape), "rounds": args.rounds}
    print("settings:", ", ".join(f"{k} {v}" for k, v in settings.items()))
    print(load(), flush=True)
    wanted = [n for n in NAMES if n in args.names or (not args.names and (args.all or n not in RIVALS or not RIVALS[n].asked))]
    rows = []
    ask("benchmarks.ceilings:copies", shape, args.rounds)
    for kind in OURS:
        if names := [n for n in wanted if n in RIVALS and n.startswith(f"{kind}/")]:
            rows += measure(kind, names, shape, args.rounds)
    for name, given in PROBES.items():
        if names := [n for n in wanted if n in given.rows]:
            rows += probe(name, given, names, shape, args.rounds)
    print(f"{load()}\n\n{row_tables.table(rows)}")
    args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
