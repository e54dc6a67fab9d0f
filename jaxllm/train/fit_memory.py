"""The least recomputation with which a train step fits into a device's memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxllm.core.types import UserError
from jaxllm.train import chips

GIB = 2**30


def limit_of(device: Any) -> float | None:
    """A device's memory in bytes, as its runtime says it, or as its maker does; None where neither is known (a CPU)."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    chip = chips.of(device.device_kind)
    return None if chip is None else chip.memory * chips.share(device, chip)


def peak_of(compiled: Any) -> float:
    """Bytes that a compiled program holds at most on a device: arguments, results that are not donated, temporaries."""
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def least(policies: Sequence[str], compiled_bytes: Callable[[str], float], limit: float) -> tuple[str, dict[str, float]]:
    """(the first policy whose step fits, the bytes of those that were tried), from the least recomputation to the most.

    compiled_bytes compiles a policy's step, so those behind the one that fits are not asked for. UserError when none fits.
    """
    tried: dict[str, float] = {}
    for name in policies:
        tried[name] = compiled_bytes(name)
        if tried[name] <= limit:
            return name, tried
    best = min(tried, key=lambda name: tried[name])
    raise UserError(
        f"the train step needs {tried[best] / GIB:.2f} GiB a device with remat={best}, the device has {limit / GIB:.2f} GiB: "
        "raise config.accumulate or mesh.fsdp, or lower config.batch_size"
    )
