"""Fault points: the named places of a run where a test kills it. Without the variable a point does nothing.

JAXLLM_FAULT=<name>[@n][=hang] ends the process with 137 when it passes the point for the n-th time (the first unless given), as
SIGKILL does: no `finally`, no flush; with =hang it stops there instead and never goes on. JAXLLM_FAULT_TRACE=<file> adds a line
"<Unix seconds> <name>" to a file for every point that is passed, so that a kill from outside can be told where it hit.
"""

from __future__ import annotations

import collections
import os
import re
import time

KILL, TRACE = "JAXLLM_FAULT", "JAXLLM_FAULT_TRACE"
POINTS = {
    "opened": "the run directory is open, nothing is read yet",
    "mid:restore": "a checkpoint has passed its checksums and is about to be read",
    "after:restore": "the state is read; metrics behind it are not cut off yet",
    "before:first_step": "restored or begun; no step was taken by this process",
    "after:step": "a step was handed to the device",
    "before:log": "metrics are fetched, their line is not written",
    "after:log": "the line is written",
    "before:eval": "an evaluation begins",
    "after:eval": "an evaluation has ended",
    "before:save": "a checkpoint is about to be made",
    "mid:save": "Orbax writes in the background",
    "before:manifest": "Orbax has committed the step by its rename; it has no checksums yet",
    "mid:manifest": "the checksums are written, but not under their name",
    "after:manifest": "the step is verified; older ones are still there",
    "mid:delete": "an old step is moved out of the way, its files are still there",
    "after:delete": "the old step is gone",
    "mid:rollout": "online RL: samples are drawn, not scored",
    "after:rollout": "online RL: the update's batch is made, nothing is updated",
    "mid:update": "online RL: some of an iteration's updates are made",
    "before:result": "trained and saved; result.json is not written",
    "after:result": "result.json is written",
}
ONLINE = ("mid:rollout", "after:rollout", "mid:update")  # only online RL passes them

_passed: collections.Counter[str] = collections.Counter()


def point(name: str) -> None:
    """A place that has a name in POINTS."""
    wanted, trace = os.environ.get(KILL), os.environ.get(TRACE)
    if trace:
        with open(trace, "a", encoding="utf-8") as file:
            file.write(f"{time.time():.3f} {name}\n")
    if wanted:
        _meet(name, wanted)


def parse(wanted: str) -> tuple[str, int, bool]:
    """(point, which time, whether it hangs) of `name[@n][=hang]`; ValueError names what is wrong."""
    found = re.fullmatch(r"([a-z:_]+)(?:@(\d+))?(=hang)?", wanted)
    if not found or found[1] not in POINTS:
        raise ValueError(f"{KILL}={wanted}: give one of {', '.join(POINTS)}, and @n for the n-th time")
    return found[1], int(found[2] or 1), bool(found[3])


def _meet(name: str, wanted: str) -> None:
    where, number, hangs = parse(wanted)
    _passed[name] += 1
    if name != where or _passed[name] != number:
        return
    while hangs:
        time.sleep(3600)
    os._exit(137)
