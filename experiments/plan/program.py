"""A compiled program's memory and text, or what the compiler says of one that does not fit."""

from __future__ import annotations

import re
import time
from typing import Any, NamedTuple

import jax

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "": 1}


class Compiled(NamedTuple):
    """text: the optimised HLO ("" where it did not fit); peak: bytes a device, of a program that did not fit what it would have
    used; arguments, temporaries, aliased: of them; limit: what the compiler took for the memory, 0 where it did not say."""

    text: str
    seconds: float
    peak: float
    arguments: float = 0.0
    temporaries: float = 0.0
    limit: float = 0.0
    buffers: tuple[tuple[float, str, str], ...] = ()

    @property
    def fits(self) -> bool:
        return bool(self.text)


def compiled(lowered: Any) -> Compiled:
    """The program, or what the compiler says of one that does not fit."""
    start = time.perf_counter()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return refused(str(error), time.perf_counter() - start)
    seconds, m = time.perf_counter() - start, program.memory_analysis()
    peak = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
    peak = max(peak, getattr(m, "peak_memory_in_bytes", 0))
    return Compiled(program.as_text(), seconds, peak, m.argument_size_in_bytes, m.temp_size_in_bytes)


def number(text: str) -> float:
    """`15.75G` in bytes."""
    value, unit = re.fullmatch(r"([\d.]+)([KMG]?)B?", text).groups()
    return float(value) * UNITS[unit]


def refused(text: str, seconds: float) -> Compiled:
    """The numbers of the TPU compiler's error: `Used 20.3G of 15.75G hbm`, and its largest allocations."""
    used = re.search(r"Used ([\d.]+[KMG]?)B? of ([\d.]+[KMG]?)B? hbm", text)
    peak, limit = (number(x) for x in used.groups()) if used else (0.0, 0.0)
    found = re.findall(r"Size: ([\d.]+[KMG]?)B?\s+(?:Operator: op_name=\"([^\"]*)\"[^\n]*\n)?\s*Shape: (\S+)", text)
    buffers = tuple((number(size), shape, name) for size, name, shape in found)
    return Compiled("", seconds, peak, limit=limit, buffers=buffers)
