"""Kill runs until it is believed that they cannot be hurt: SIGKILL at every named fault point and at random moments.

python scripts/soak.py --kills=200 --stages=pretrain,sft,dpo,ppo,grpo --out=soak.json
python scripts/soak.py --kills=0 --stages=pretrain                          # every point once, no random moments
python scripts/soak.py --at=after:manifest,before:result --stages=mlm,t5    # further stages: soak_stages.py

Every stage is run once without a kill. Then the same command is started, killed and started again until it ends, over and over,
and each end must have the SHA-256 of the first (parameters, optimizer, data state), its losses, and its rows at every step. The
killed processes are real ones, forked from this one, which has imported jax but never touched a device: that saves the seconds
of importing, and nothing else is shared.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np  # noqa: E402
from soak_stages import NEEDS, settings  # noqa: E402

from experiments import common  # noqa: E402
from jaxllm import exits, launch  # noqa: E402
from jaxllm.train import faults  # noqa: E402
from jaxllm.train.checkpoint import digest  # noqa: E402

SECONDS = 300  # for one try at most
ROUNDS = 4  # run directories for every point to be met in
RANDOM, NEVER = "random", "never"


class Kill(NamedTuple):
    """What ended a try: the fault point that was asked for or RANDOM, the last point that was passed, what that cost."""

    asked: str
    phase: str
    lost: float  # seconds of training behind the last verified checkpoint


# ---- what is read


def leaves(columns: Any) -> list[np.ndarray]:
    """The columns without floats: those are computed (log-probabilities of a reference)."""
    found = [x for _, side in sorted(columns.items()) for x in (leaves(side) if isinstance(side, dict) else [np.asarray(side)])]
    return [x for x in found if x.dtype.kind != "f"]


def recording(path: Path) -> Callable:
    """make_loader whose batches are noted, a line for each: [the data's fingerprint, step, [a number for every row]]."""
    make = common.make_loader

    def made(columns: Any, *args: Any, **options: Any) -> Any:
        loader = make(columns, *args, **options)
        data = loader.state(0)["fingerprint"]

        def batch(step: int) -> Any:
            found = loader.batch(step)
            rows = [zlib.crc32(b"".join(np.asarray(x).tobytes() for x in row)) for row in zip(*leaves(found), strict=True)]
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps([data, step, rows]) + "\n")
            return found

        return type(loader)(loader.size, batch, loader.state)

    return made


# ---- processes


def forked(work: Callable[[], int | None], log: Path, environment: dict[str, str] | None = None) -> int:
    """The pid of a child that does the work and ends with its code."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    try:
        with log.open("a") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        os.environ.update(environment or {})
        code = work() or 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = 1
    sys.stdout.flush()
    os._exit(code)


def command(stage: str, overrides: dict, workdir: Path, rows: Path) -> Callable[[], int]:
    """What a child runs: a stage, its rows noted."""

    def work() -> int:
        common.make_loader = recording(rows)
        main = importlib.import_module(f"experiments.{stage}").main
        return exits.guard(lambda: launch.start(main, stage, overrides, workdir), workdir, "the same command")

    return work


def wait(pid: int, seconds: float) -> int | None:
    """The exit code of a child, as a shell gives it; None when it still runs after so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            code = os.waitstatus_to_exitcode(status)
            return 128 - code if code < 0 else code
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.002)


def finished(pid: int, what: str, log: Path) -> None:
    """Wait for a child that must end well."""
    if code := wait(pid, SECONDS):
        raise SystemExit(f"{what} ended with {code}:\n{log.read_text()[-3000:]}")


def bits(workdir: Path) -> str:
    """The digests of a run and of its own stages, taken by a child: this process must not touch a device."""
    told, log = workdir / "digest.txt", workdir / "digest.log"

    def work() -> None:
        told.write_text("".join(digest(found.parent) for found in sorted(workdir.rglob("checkpoints"))))

    finished(forked(work, log), f"the digest of {workdir}", log)
    return told.read_text()


# ---- what must be equal


def points(trace: Path) -> list[tuple[float, str]]:
    lines = trace.read_text().splitlines() if trace.exists() else []
    return [(float(line.split()[0]), line.split()[1]) for line in lines]


def lost(passed: list[tuple[float, str]], when: float) -> float:
    """Seconds of training that a kill at `when` costs: since the try's last verified checkpoint, or its first step."""
    safe = [t for t, name in passed if name == "after:step"][:1] + [t for t, name in passed if name == "after:manifest"]
    return max(0.0, when - max(safe)) if safe else 0.0


def said(workdir: Path) -> list:
    """What a run and its own stages have written down, without times and speeds: the lines of metrics.jsonl, and results."""
    timed = ("t", "time/", "perf/")

    def plain(row: dict) -> dict:
        return {name: x for name, x in row.items() if not (name == timed[0] or name.startswith(timed[1:]))}

    files = sorted([*workdir.rglob("metrics.jsonl"), *workdir.rglob("result.json")])
    rows = [(f, map(json.loads, f.read_text().splitlines()) if f.suffix == ".jsonl" else [result(f)]) for f in files]
    return [(str(f.relative_to(workdir)), [plain(row) for row in found]) for f, found in rows]


def result(file: Path) -> dict:
    found = json.loads(file.read_text())
    return found["metrics"] | {"claims": found["claims"]}


def read(path: Path) -> dict[tuple[str, int], list[int]]:
    """{(data, step): its rows}; a step that was read again must have been the same."""
    found: dict[tuple[str, int], list[int]] = {}
    for line in path.read_text().splitlines():
        try:
            data, step, rows = json.loads(line)
        except ValueError:  # torn by a kill
            continue
        if found.setdefault((data, step), rows) != rows:
            raise SystemExit(f"{path}: step {step} read other rows than before")
    return found


def once_an_epoch(rows: dict[tuple[str, int], list[int]]) -> bool:
    """Whether every row of each data comes once before any comes again. Equal rows count as one another."""
    return all(_once({step: found for (data, step), found in rows.items() if data == of}) for of in {data for data, _ in rows})


def _once(rows: dict[int, list[int]]) -> bool:
    order = [row for step in sorted(rows) for row in rows[step]]
    kinds = len(set(order))
    return sorted(rows) == list(range(len(rows))) and len(set(order[:kinds])) == kinds


# ---- one stage


def uninterrupted(root: Path, stage: str, name: str) -> tuple[Path, float]:
    """(the directory of a run without a kill, its seconds)."""
    workdir, log, began = root / name, root / f"{name}.log", time.monotonic()
    work = command(stage, settings(root, stage), workdir, root / f"{name}.rows")
    finished(forked(work, log, {faults.TRACE: str(root / f"{name}.trace")}), stage, log)
    return workdir, time.monotonic() - began


def attempt(work: Callable, log: Path, trace: Path, asked: str, seconds: float) -> tuple[int, Kill | None]:
    """(exit code, the Kill) of one try; None when it came to its end before it could be killed."""
    trace.unlink(missing_ok=True)
    environment = {faults.TRACE: str(trace)} | ({} if asked in (RANDOM, NEVER) else {faults.KILL: asked})
    pid = forked(work, log, environment)
    code = wait(pid, seconds if asked == RANDOM else SECONDS)
    if code is None:
        os.kill(pid, signal.SIGKILL)
        code = wait(pid, 30)
    passed = points(trace)
    if code != 137:
        return code or 0, None
    return code, Kill(asked, passed[-1][1] if passed else "before:opened", lost(passed, time.time()))


def plan(trace: Path, draw: random.Random) -> Iterator[str]:
    """Every point that the stage passes, in turn with random moments, for ever; points also at their second and third time."""
    names = sorted({name for _, name in points(trace)} | {"mid:restore", "after:restore"})
    once = {"opened", "mid:restore", "after:restore", "before:first_step", "before:result", "after:result"}
    while True:
        for name in draw.sample(names, len(names)):
            yield name if name in once else f"{name}@{draw.randint(1, 3)}"
            yield RANDOM


def every_point(trace: Path, draw: random.Random) -> list[str]:
    """Every point that the stage passes, once, those of a restart and of the end behind a few others."""
    names = sorted({name for _, name in points(trace)} | {"mid:restore", "after:restore"})
    draw.shuffle(names)
    last = ("mid:restore", "after:restore", "before:result", "after:result")
    return [n for n in names if n not in last] + [n for n in last if n in names]


def left(every: list[str], done: list[Kill]) -> list[str]:
    """The points that nothing was killed at yet; behind a first round a checkpoint is made before them."""
    rest = [name for name in every if name not in {kill.asked for kill in done}]
    return ["after:manifest", *rest] if rest and done else rest


def survive(root: Path, stage: str, name: str, asked: Callable[[], str], moment: Callable[[], float]) -> tuple[list[Kill], int]:
    """(the kills, the tries) of one run directory, started until it ends; asked() and moment() say what kills the next try."""
    workdir, rows, log = (root / f"{name}{end}" for end in ("", ".rows", ".log"))
    work, code, tries, kills = command(stage, settings(root, stage), workdir, rows), -1, 0, []
    while code:
        code, kill = attempt(work, log, root / f"{name}.trace", asked(), moment())
        tries += 1
        if kill is None and code:
            raise SystemExit(f"{stage} ended with {code}:\n{log.read_text()[-3000:]}")
        kills += [kill] if kill else []
    return kills, tries


def soak(root: Path, stage: str, kills: int, seed: int, at: list[str]) -> dict[str, Any]:
    """Kill a stage `kills` times, at 0 once at every point, or once at each point of `at`; what happened."""
    draw = random.Random(f"{seed} {stage}")
    whole, begun = root / stage, time.monotonic()
    trace = root / f"{stage}.trace"
    every, expected = at or every_point(trace, draw), bits(whole)
    due = plan(trace, draw)
    done: list[Kill] = []
    ends, tries, resumed, equal, usual = 0, 0, 0, True, 0.0
    if not at:
        again, usual = uninterrupted(root, stage, f"{stage}.again")  # with a warm compile cache, and R1 by the way
        equal = bits(again) == expected and said(again) == said(whole)
    while len(done) < kills if kills else ends < ROUNDS and left(every, done):
        name = f"{stage}.{ends}"
        budget = itertools.islice(due, kills - len(done)) if kills else iter(left(every, done))
        found, number = survive(root, stage, name, lambda b=budget: next(b, NEVER), lambda: draw.uniform(0, usual))
        done, tries, ends = done + found, tries + number, ends + 1
        resumed += (root / f"{name}.log").read_text().count("resumed at step")
        same = bits(root / name) == expected and said(root / name) == said(whole)
        rows = read(root / f"{name}.rows")
        equal = equal and same and rows == read(root / f"{stage}.rows") and once_an_epoch(rows)
        if equal:
            shutil.rmtree(root / name)
    return {
        "stage": stage, "kills": len(done), "at_points": sum(k.asked != RANDOM for k in done), "tries": tries, "ends": ends,
        "resumed": resumed, "points": every, "phases": sorted({k.phase for k in done}),
        "most_seconds_lost": max((k.lost for k in done), default=0.0),
        "seconds": time.monotonic() - begun, "equal": equal,
    }  # fmt: skip


# ---- all of them


def drive(root: Path, stages: list[str], kills: int, seed: int, jobs: int, at: list[str]) -> list[dict[str, Any]]:
    """The stages, `jobs` at once, each in a driver of its own."""
    for stage in (s for s in NEEDS if s in stages or any(s in NEEDS[other] for other in stages)):
        print(f"{stage}: {uninterrupted(root, stage, stage)[1]:.1f} s without a kill, compilation included", flush=True)
    shares = {s: kills // len(stages) + (i < kills % len(stages)) for i, s in enumerate(stages)}
    waiting, running, found = list(stages), {}, {}
    while waiting or running:
        while waiting and len(running) < jobs:
            stage = waiting.pop(0)
            path = root / f"{stage}.json"
            work = lambda s=stage, p=path: p.write_text(json.dumps(soak(root, s, shares[s], seed, at))) and None  # noqa: E731
            running[forked(work, root / f"{stage}.driver.log")] = stage
        pid, status = os.wait()
        stage = running.pop(pid)
        if os.waitstatus_to_exitcode(status):
            raise SystemExit(f"{stage} failed:\n{(root / f'{stage}.driver.log').read_text()[-3000:]}")
        found[stage] = json.loads((root / f"{stage}.json").read_text())
        print(row(found[stage]), flush=True)
    return [found[stage] for stage in stages]


HEAD = ("stage", "kills", "at points", "phases", "tries", "resumed", "ends", "s a kill", "most s lost", "SHA equal")


def row(r: dict[str, Any]) -> str:
    seconds = f"{r['seconds'] / r['kills']:.2f}" if r["kills"] else "-"
    values = (r["stage"], r["kills"], r["at_points"], len(r["phases"]), r["tries"], r["resumed"], r["ends"], seconds)
    return " ".join(f"{v!s:>11}" for v in (*values, f"{r['most_seconds_lost']:.2f}", "yes" if r["equal"] else "NO"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="over all stages; 0: every point once")
    parser.add_argument("--at", default="", help="points with commas between: kill once at each of them, instead")
    parser.add_argument("--stages", default="pretrain,sft,dpo,ppo,grpo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", default="")
    parser.add_argument("--workdir", default="", help="kept; a temporary one unless given")
    given = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    root = Path(given.workdir or tempfile.mkdtemp(prefix="soak")).absolute()
    root.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    print(" ".join(f"{name:>11}" for name in HEAD))
    at = given.at.split(",") if given.at else []
    results = drive(root, given.stages.split(","), 0 if at else given.kills, given.seed, given.jobs, at)
    total = {
        "kills": sum(r["kills"] for r in results), "seconds": time.monotonic() - began, "stages": results,
        "phases": sorted({p for r in results for p in r["phases"]}), "equal": all(r["equal"] for r in results),
    }  # fmt: skip
    print(f"{total['kills']} kills in {total['seconds']:.0f} s, {len(total['phases'])} phases: {', '.join(total['phases'])}")
    if given.out:
        Path(given.out).write_text(json.dumps(total, indent=2) + "\n", encoding="utf-8")
    if not given.workdir and total["equal"]:
        shutil.rmtree(root)
    sys.exit(0 if total["equal"] else 1)


if __name__ == "__main__":
    main()
