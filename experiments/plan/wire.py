"""What travels between devices, from optimised HLO text."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from experiments.plan.hlo import SHAPE, Instruction, computations, fused_computations, runs, size_of

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute", "collective-broadcast",
)  # fmt: skip


class Collective(NamedTuple):
    """One collective: how many devices take part, the whole array's bytes, its type, and how often a step runs it."""

    kind: str
    group: int
    size: float
    dtype: str
    times: float
    where: str

    @property
    def received(self) -> float:
        """Bytes that reach one device in a step, by the ring's count: (g - 1) / g of the whole array, twice for an all-reduce."""
        if self.kind == "collective-permute":
            return self.times * self.size
        return self.times * self.size * (self.group - 1) / self.group * (2 if self.kind == "all-reduce" else 1)


def group_of(rest: str) -> int:
    """The number of devices that exchange: {{0,1},{2,3}}, [groups,size]<=[...], or mesh['a'=4,'b'=2], device_ids=... {'a'}."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(iota[1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*)? \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[name]) * int(part or 1) for name, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2]))
    return 2 if "source_target_pairs" in rest else 1


def collectives(text: str) -> list[Collective]:
    """Everything that travels in a step, loops counted as often as they run.

    Halves of an asynchronous pair count once. So do the parts of one that the TPU compiler has fused into the products that it
    overlaps with: they share a channel, and the outermost says how often it runs.
    """
    found, entry = computations(text)
    fused = fused_computations(found)
    out, parts = [], {}
    for name, times in runs(found, entry).items():
        for one in found.get(name, []):
            kind = one.opcode.removesuffix("-start")
            # the TPU compiler's fused all-reduce and slice: each device receives its own part only
            kind = "reduce-scatter" if kind == "all-reduce" and name.startswith("all-reduce-scatter") else kind
            if kind in KINDS and (travels := _collective(kind, one, times)).group > 1:
                channel = re.search(r"channel_id=(\d+)", one.rest)
                if name in fused and channel:
                    known = parts.get(channel[1], travels)
                    parts[channel[1]] = min(known, travels, key=lambda c: c.times)
                else:
                    out.append(travels)
    return out + list(parts.values())


def _collective(kind: str, one: Instruction, times: float) -> Collective:
    group, shape = group_of(one.rest), one.shape
    if one.opcode.endswith("-start") and shape.startswith("("):
        # (operands, results): an all-gather's results are the larger half, a permute has counters behind them
        parts = [size_of(m[0]) for m in re.finditer(r"[a-z]\w*\[[\d,]*\]", shape)]
        half = len(parts) // 2
        size = parts[1] if kind == "collective-permute" else sum(parts[half:])
    else:
        size = size_of(shape)
    size *= group if one.opcode.startswith("reduce-scatter") else 1  # its result is a part
    dtype = (SHAPE.search(shape) or ["", ""])[1]
    where = re.search(r'op_name="([^"]*)"', one.rest)
    return Collective(kind, group, size, dtype, times, where[1] if where else one.name)
