"""What accelerators can do, from what their makers publish."""

from __future__ import annotations

from dataclasses import dataclass
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
