"""What memory there is, and the least recomputation with which a train step fits into a device's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
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


def host_room() -> float | None:
    """Bytes of the host's memory that this process may still take: the least of what the system has available, its control
    group allows and RLIMIT_AS leaves; None where the system says nothing (only Linux does)."""
    rooms = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        rooms.append(1024.0 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))))
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        group = Path("/sys/fs/cgroup")
        rooms.append(float((group / "memory.max").read_text()) - float((group / "memory.current").read_text()) + _cache(group))
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        soft, taken = resource.getrlimit(resource.RLIMIT_AS)[0], Path("/proc/self/statm").read_text().split()[0]
        if soft != resource.RLIM_INFINITY:
            rooms.append(float(soft - int(taken) * resource.getpagesize()))
    return max(0.0, min(rooms)) if rooms else None


def _cache(group: Path) -> float:
    """Bytes of a control group's files in memory, which give way."""
    pairs = (line.split() for line in (group / "memory.stat").read_text().splitlines())
    return float(dict(pairs)["inactive_file"])


def exhausted(error: Exception) -> str | None:
    """One line on an allocation that failed, with what to change; None for other errors."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if not isinstance(error, MemoryError) and not ("RESOURCE_EXHAUSTED" in text and "emory" in text):
        return None
    return (
        f"Not enough memory ({text[:160]}): try a larger --config.accumulate, --config.optim.moments=bfloat16, a smaller "
        "--config.batch_size or data.length, or more devices over --config.mesh.fsdp; python -m experiments.plan shows the sizes"
    )


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
