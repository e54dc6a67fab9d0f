"""The bytes that a step compiled for many devices receives, over the least that its sharding needs, by `experiments.plan`."""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from pathlib import Path

from benchmarks.shape import Shape
from benchmarks.startup import fresh

ROW, SIMULATED = "plan/collective_bytes", "plan_simulated/collective_bytes"
# parameters over all devices: the largest program that 16 v5e chips compile in minutes, and the default one on simulated devices
POD = ["--config=configs/pretrain.py:1b", "--topology=v5e:4x4"]
CPUS = ["--config=configs/pretrain.py", "--simulate=8"]


def collectives(shape: Shape, rounds: int) -> dict[str, list[float]]:
    """One value for each row, as what is compiled is compiled once: a pod's needs libtpu."""
    found = {SIMULATED: [received(CPUS)]}
    return found | ({ROW: [received(POD)]} if importlib.util.find_spec("libtpu") else {})


def received(machine: list[str]) -> float:
    """Bytes that a device receives in a step, over the least."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}  # libtpu compiles without a TPU, and must not look for one
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        fresh(["-m", "experiments.plan", *machine, f"--out={file}"])
        plan = json.loads(file.read_text())
    total, least = sum(plan["received"].values()), plan["received_least"]
    print(f"  {' '.join(machine)}: {total / 1e6:,.1f} MB a device, at least {least / 1e6:,.1f} MB", flush=True)
    return total / least
