"""The devices of a plan: a TPU topology that is not there, or simulated CPU devices."""

from __future__ import annotations

import math
import os
import re
from typing import Any, NamedTuple

from jaxllm.core.types import UserError
from jaxllm.train import chips

# slices that can be had: docs.cloud.google.com/tpu/docs/{v5e,v6e,v4,v5p,tpu7x}
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16", "16x16x24",
)  # fmt: skip
SHAPES = {"v4": CUBES, "v5e": FLAT, "v5p": CUBES, "v6e": FLAT, "tpu7x": CUBES}
QUIET = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3",
}  # fmt: skip
WHOLE = {2: 16, 3: 4}  # a side that is a multiple of this closes to a ring, by the number of dimensions


class Machine(NamedTuple):
    """devices; chip: what one chip can do (None on a simulated machine); part: of a chip that a device is; memory, peak,
    bandwidth: a device's share; wire: bytes/s that leave it, one way, over links that are there."""

    name: str
    devices: list[Any]
    chip: chips.Chip | None = None
    part: float = 1.0
    wire: float = 0.0

    @property
    def memory(self) -> float:
        return self.chip.memory * self.part if self.chip else 0.0

    @property
    def peak(self) -> float:
        return self.chip.peak * self.part if self.chip else 0.0

    @property
    def bandwidth(self) -> float:
        return self.chip.bandwidth * self.part if self.chip else 0.0


def prepare(flags: dict[str, Any]) -> None:
    """What has to be set before JAX looks for devices: no accelerator is touched, and as many CPU devices as are simulated."""
    import jax

    if flags["topology"] and flags["simulate"]:
        raise UserError("give --topology or --simulate, not both")
    if not flags["topology"] and not flags["simulate"]:
        raise UserError("name the hardware: --topology=v5e:4x4 (or v5p:4x4x4, v6e:8x8, ...), or --simulate=8 CPU devices")
    # libtpu would ask for a machine's metadata, wait for an answer, and say at length that there is none
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    if flags["simulate"] and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", flags["simulate"])


def find(topology: str, simulate: int) -> Machine:
    """The machine of the flags. UserError where libtpu is missing or the topology does not exist, with the nearest that does."""
    if simulate:
        import jax

        have = jax.devices("cpu")
        if simulate < 1 or len(have) < simulate:
            raise UserError(f"--simulate={simulate}: this process has {len(have)} CPU devices, use that or fewer")
        return Machine(f"{simulate} simulated CPU devices", have[:simulate])
    devices = described(topology)
    chip = chips.of(devices[0].device_kind)
    if chip is None:
        kind = devices[0].device_kind
        raise UserError(f"--topology={topology}: nothing is known of {kind!r}, choose one of {', '.join(SHAPES)}")
    part = chips.share(devices[0], chip)
    return Machine(topology, devices, chip, part, part * links(topology, chip) * chip.link)


def described(topology: str) -> list[Any]:
    """The devices of a topology, from libtpu."""
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except RuntimeError as error:  # JaxRuntimeError is one
        text = str(error)
        if "not installed" in text:
            how = 'pip install -e ".[tpu]", or plan with --simulate=8 CPU devices'
            raise UserError(f"planning for TPUs needs libtpu: {how}") from None
        if "INVALID_ARGUMENT" not in text and "NOT_FOUND" not in text:
            raise
        raise UserError(f"--topology={topology}: no such topology; {nearest(topology)}") from None


def sides(topology: str) -> list[int]:
    return [int(x) for x in topology.partition(":")[2].split("x") if x]


def nearest(topology: str) -> str:
    """What there is instead: the slice of the same chip with the nearest number of chips."""
    kind, _, shape = topology.partition(":")
    if kind not in SHAPES:
        return f"chips are {', '.join(SHAPES)}, for example v5e:4x4 or v5p:4x4x4"
    wanted = math.prod(int(x) for x in re.findall(r"\d+", shape)) or 1
    size = lambda text: math.prod(int(x) for x in text.split("x"))  # noqa: E731
    best = min(SHAPES[kind], key=lambda text: abs(math.log(size(text) / wanted)))
    return f"the nearest is {kind}:{best} ({size(best)} chips)"


def links(topology: str, chip: chips.Chip) -> int:
    """Links of a chip that lead anywhere in this slice: two along a ring, one along an open side."""
    shape = sides(topology)
    whole = WHOLE[chip.links // 2]
    return sum(0 if side == 1 else 2 if side % whole == 0 else 1 for side in shape)
