"""What accelerators can do, from what their makers publish."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB, TERA, GIGA = 2**30, 1e12, 1e9


@dataclass(frozen=True)
class Chip:
    """A chip: dense bfloat16 peak in FLOP/s, memory in bytes and bytes/s, links to its neighbours (bytes/s of one, one way), and
    its share of the network beyond them, bytes/s. cores: a chip that JAX shows as several devices shares all of it."""

    name: str
    peak: float
    memory: float
    bandwidth: float
    links: int
    link: float
    network: float
    cores: int = 1

    @property
    def wire(self) -> float:
        """Bytes/s that leave the chip over all of its links."""
        return self.links * self.link


# TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}. A link's rate is the bidirectional bandwidth of a chip over its
# ports over two; v4's is its pod's all-reduce bandwidth over 4096 chips and 6 ports.
# GPUs: the SXM modules (dense bfloat16; NVLink one way; one 400 or 200 Gbit/s adapter a GPU). Their figures, and every `network`,
# are the usually quoted ones and were not checked against a sheet: doubt a prediction that they limit.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275 * TERA, 32 * GIB, 1200 * GIGA, 6, 45 * GIGA, 6.25 * GIGA, cores=2),
        Chip("v5e", 197 * TERA, 16 * GIB, 819 * GIGA, 4, 50 * GIGA, 3.125 * GIGA),
        Chip("v5p", 459 * TERA, 95 * GIB, 2765 * GIGA, 6, 100 * GIGA, 6.25 * GIGA, cores=2),
        Chip("v6e", 918 * TERA, 32 * GIB, 1640 * GIGA, 4, 100 * GIGA, 12.5 * GIGA),
        Chip("tpu7x", 2307 * TERA, 192 * GIB, 7380 * GIGA, 6, 100 * GIGA, 12.5 * GIGA, cores=2),
        Chip("A100", 312 * TERA, 80 * GIGA, 2039 * GIGA, 12, 25 * GIGA, 25 * GIGA),
        Chip("H100", 989.4 * TERA, 80 * GIGA, 3350 * GIGA, 18, 25 * GIGA, 50 * GIGA),
        Chip("H200", 989.4 * TERA, 141 * GIGA, 4800 * GIGA, 18, 25 * GIGA, 50 * GIGA),
    )
}

# what JAX calls a device, in lower case; the first that is in the name counts
KINDS = {
    "v5 lite": "v5e", "v5e": "v5e", "v6 lite": "v6e", "v6e": "v6e", "tpu7x": "tpu7x", "tpu v5": "v5p", "tpu v4": "v4",
    "a100": "A100", "h200": "H200", "h100": "H100",
}  # fmt: skip


def of(device_kind: str) -> Chip | None:
    """The chip of a JAX device's `device_kind`, None where it is not known (a CPU)."""
    kind = device_kind.lower()
    return next((CHIPS[name] for part, name in KINDS.items() if part in kind), None)


def share(device: Any, chip: Chip) -> float:
    """The part of a chip that one device is: less than 1 where JAX shows its cores one by one (v4 and tpu7x ahead of time)."""
    return getattr(device, "num_cores", chip.cores) / chip.cores if device.platform == "tpu" else 1.0


# ---- what a notebook says of the machine that it runs on

DRIVE = "/content/drive/MyDrive"


def device_check(devices: Sequence[Any], version: str, *, on_colab: bool, drive: bool, simulated: bool = False) -> list[str]:
    """Lines on the devices that JAX has found and, on Colab, on what to change. simulated: a CPU is what is wanted.

    A mark leads each: the devices that are wanted, or not, and `!` for a disk that is temporary.
    """
    kind, chip = devices[0].device_kind, of(devices[0].device_kind)
    memory = (devices[0].memory_stats() or {}).get("bytes_limit") if devices[0].platform != "cpu" else None
    parts = [f"{kind.upper() if kind == 'cpu' else kind} x{len(devices)}" + (f" ({memory / GIB:.2f} GiB)" if memory else "")]
    parts += [f"jax {version}"] + (["libtpu ok"] if devices[0].platform == "tpu" else [])
    parts += [f"bf16 peak {chip.peak / TERA:.0f} TFLOP/s"] if chip else []
    lines = [f"✓ {' · '.join(parts)}"]
    if devices[0].platform == "cpu" and on_colab and not simulated:
        lines = [
            "✗ No TPU: this notebook is on CPU. Runtime > Change runtime type > v5e-1 TPU, then run again. "
            "(Or continue: everything here runs on a CPU, slower.)"
        ]
    if on_colab and not drive:
        lines.append(f"! Colab's disk is temporary: set WORKDIR='{DRIVE}/jaxllm' to keep checkpoints (Drive not mounted)")
    return lines


def print_device_check(*, simulated: bool = False) -> None:
    """`device_check` of this process."""
    import jax

    on_colab, drive = "google.colab" in sys.modules, Path(DRIVE).is_dir()
    print("\n".join(device_check(jax.devices(), jax.__version__, on_colab=on_colab, drive=drive, simulated=simulated)))
