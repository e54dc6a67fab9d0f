"""The watchdog: a run that does nothing for too long leaves the stacks of its threads, and ends with a code that says restart."""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

FACTOR = 10  # times the median step
KNOWN = 3  # steps before their median counts
SLOW = 7.5  # times the least: what compiles, evaluates or saves for the first time; 15 minutes for 2
CODE = 75
PATIENCE = 10.0  # seconds for the stacks to be written


@dataclass(frozen=True, eq=False)
class Place:
    """Where the loop is: a new one each time that it comes to a part, so that the same part twice is told apart."""

    part: str


def limit(part: str, least: float, steps: Sequence[float], longest: Mapping[str, float]) -> float:
    """Seconds that a part may take, given the seconds of steps and the longest of every other part so far.

    max(least, 10 x the median step) for steps; where nothing is known yet, and for what is not a step, 7.5 x least at least.
    """
    if part == "step" and len(steps) >= KNOWN:
        return max(least, FACTOR * statistics.median(steps))
    return max(SLOW * least, FACTOR * longest.get(part, 0.0))


@contextlib.contextmanager
def watchdog(
    directory: Path, least: float, *, process: int = 0, warn: Callable[[str], None] = print
) -> Iterator[Callable[[str], None]]:
    """enter(part), to be called whenever the run comes to another part of its loop: first_step, data, step, eval, save.

    A thread looks on. When a part takes longer than its `limit`, all threads' stacks go to directory/stacks.txt
    (stacks-<process>.txt for the others) and the process ends with 75 at once: what hangs cannot be asked to clean up.
    least 0: nobody looks. Time in which the whole process did not run (Ctrl-Z, a laptop that sleeps) does not count.
    """
    if least <= 0:
        yield lambda part: None
        return
    done, clock, longest = threading.Event(), time.monotonic, collections.defaultdict[str, float](float)
    steps: collections.deque[float] = collections.deque(maxlen=65)
    place, begun = Place("start"), clock()

    def enter(new: str) -> None:
        nonlocal place, begun
        if new == "data":
            steps.append(clock() - begun)
            begun = clock()
        place = Place(new)

    def look() -> None:
        every, before, seen, quiet = min(1.0, least / 10), clock(), place, 0.0
        while not done.wait(every):
            now, here = clock(), place
            if here is seen:
                quiet += min(now - before, 2 * every)
            else:  # seconds are counted here alone, so that no moment is counted for the part behind it
                longest[seen.part] = max(longest[seen.part], quiet if seen.part != "step" else 0.0)
                seen, quiet = here, 0.0
            before, most = now, limit(here.part, least, tuple(steps), longest)
            if quiet > most:
                _end(directory, f"nothing happened for {quiet:.0f} s in `{here.part}`, the limit is {most:.0f} s", process, warn)

    threading.Thread(target=look, name="watchdog", daemon=True).start()
    try:
        yield enter
    finally:
        done.set()


def _end(directory: Path, said: str, process: int, warn: Callable[[str], None]) -> None:
    """Tell, and end the process whether that comes to an end or not: what hangs may be the disk that is written to."""
    teller = threading.Thread(target=_tell, args=(directory, said, process, warn), name="stacks", daemon=True)
    teller.start()
    teller.join(PATIENCE)
    os._exit(CODE)


def _tell(directory: Path, said: str, process: int, warn: Callable[[str], None]) -> None:
    path = directory / (f"stacks-{process}.txt" if process else "stacks.txt")
    with contextlib.suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            print(said, file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)
    with contextlib.suppress(Exception):
        warn(f"the run hangs: {said}. Stacks of all threads: {path}. It ends with code {CODE}; the same command continues")
        sys.stderr.flush()
