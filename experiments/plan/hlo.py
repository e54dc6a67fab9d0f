"""Optimised HLO text as data: computations, how often each runs, and the largest buffers."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import NamedTuple

BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
INNER = re.compile(r"(while|body|cond|closed_call|checkpoint|jvp\(|transpose\()")  # parts of an op_name that are no operation
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
CALLED = re.compile(r"\b(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)\}?")
BRANCHES = re.compile(r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))")


class Instruction(NamedTuple):
    """A line of HLO: `%name = shape opcode(rest`."""

    name: str
    shape: str
    opcode: str
    rest: str


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """({computation: its instructions}, the name of the entry)."""
    found: dict[str, list[Instruction]] = {}
    name, entry = "", ""
    for line in text.splitlines():
        head = re.match(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{\s*$", line)
        if head and " = " not in line.split("{")[0]:
            name = head[2]
            entry = name if head[1] else entry
            found[name] = []
        elif name and (match := INSTRUCTION.match(line)):
            found[name].append(Instruction(*match.groups()))
    return found, entry


def trips(loop: Instruction, found: dict[str, list[Instruction]]) -> int:
    """How often a while loop runs: as the compiler says, else by `i < n` of its condition and `i + step` of its body, from 0."""
    if known := re.search(r'"known_trip_count":\s*\{\s*"n":\s*"?(\d+)', loop.rest):
        return int(known[1])
    condition, body = (re.search(rf"{part}=%?([\w.\-]+)", loop.rest) for part in ("condition", "body"))
    limit = max(constants(found.get(condition[1], [])).values(), default=1) if condition else 1
    step = step_of(found.get(condition[1], []), found.get(body[1], [])) if condition and body else 1
    return max(1, -(-limit // step))


def constants(body: list[Instruction]) -> dict[str, int]:
    return {i.name: int(m[1]) for i in body if i.opcode == "constant" and (m := re.match(r"(\d+)\)", i.rest))}


def step_of(condition: list[Instruction], body: list[Instruction]) -> int:
    """What a loop's counter grows by, 1 where that cannot be read."""
    compared = next((i for i in condition if i.opcode == "compare"), None)
    read = {i.name: int(m[1]) for i in condition if (m := re.search(r"index=(\d+)", i.rest)) and i.opcode == "get-tuple-element"}
    place = next((read[n] for n in names(compared.rest) if n in read), None) if compared else None
    root = next((i for i in reversed(body) if i.opcode == "tuple"), None)
    if place is None or root is None or place >= len(names(root.rest)):
        return 1
    by_name, known = {i.name: i for i in body}, constants(body)
    added = by_name.get(names(root.rest)[place])
    if added is None or added.opcode != "add":
        return 1
    return next((known[n] for n in names(added.rest) if n in known), 1) or 1


def names(rest: str) -> list[str]:
    """The operands of an instruction."""
    return re.findall(r"%([\w.\-]+)", rest.split(")")[0])


def runs(found: dict[str, list[Instruction]], entry: str) -> dict[str, float]:
    """How often each computation runs in a step, through nested loops, calls and fusions; of a branch: as if it were taken."""
    times: dict[str, float] = defaultdict(float)

    def visit(name: str, factor: float) -> None:
        times[name] += factor
        for one in found.get(name, []):
            for inner, each in callees(one, found):
                visit(inner, factor * each)

    visit(entry, 1.0)
    return dict(times)


def callees(one: Instruction, found: dict[str, list[Instruction]]) -> list[tuple[str, int]]:
    """(computation, how often) that an instruction runs; what an all-reduce adds with is left out."""
    if one.opcode == "while":
        body = re.search(r"body=%?([\w.\-]+)", one.rest)
        return [(body[1], trips(one, found))]
    if one.opcode.startswith(("all-reduce", "reduce")):
        return []
    named = [(m[1], 1) for m in CALLED.finditer(one.rest)]
    for several, single in BRANCHES.findall(one.rest):
        named += [(n.strip().lstrip("%"), 1) for n in (several or single).split(",")]
    return named


def size_of(shape: str) -> float:
    """Bytes of an array or of a tuple of them."""
    return sum(BYTES.get(t, 0) * math.prod(int(x) for x in dims.split(",") if x) for t, dims in SHAPE.findall(shape))


def fused_computations(found: dict[str, list[Instruction]]) -> set[str]:
    return {m[1] for body in found.values() for i in body if i.opcode == "fusion" for m in CALLED.finditer(i.rest)}


def largest(text: str, n: int = 6) -> list[tuple[float, str, str]]:
    """(bytes, shape, op_name) of the largest arrays that instructions outside of fusions make, each shape and origin once."""
    found, entry = computations(text)
    fused = fused_computations(found)
    best: dict[tuple[str, str], float] = {}
    for name in runs(found, entry).keys() - fused:
        for one in found[name]:
            if one.opcode in ("parameter", "tuple", "while", "bitcast", "get-tuple-element") or one.shape.startswith("("):
                continue
            origin = re.search(r'op_name="([^"]*)"', one.rest)
            if origin:
                best[SHAPE.match(one.shape)[0] if SHAPE.match(one.shape) else one.shape, origin[1]] = size_of(one.shape)
    rows = [(size, shape, origin) for (shape, origin), size in best.items()]
    return sorted(rows, reverse=True)[:n]


def words(origin: str) -> str:
    """An op_name for people: which pass, in how many loops, and the operation."""
    parts = [p for p in re.split(r"/", re.sub(r"jit\(\w+\)/?", "", origin)) if p]
    backward = any("transpose" in p for p in parts)
    again = any("rematted" in p or "remat" in p for p in parts)
    loops = sum(p == "while" for p in parts)
    which = ("recomputed, " if again else "") + ("backward" if backward else "forward")
    last = next((p for p in reversed(parts) if not INNER.match(p)), "")
    return f"{which}{', in the loop over layers or chunks' if loops else ''}: {last}"
