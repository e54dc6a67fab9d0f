"""What a notebook says first: which devices there are, and what to do where they are not those that were meant."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

DRIVE = Path("/content/drive/MyDrive")  # where Colab mounts it
WORKDIR = "JAXLLM_NOTEBOOK_WORKDIR"


def device_lines(devices: list[Any], version: str, *, colab: bool | None = None, drive: bool | None = None) -> list[str]:
    """One line on the devices; on Colab one more where there is no accelerator, and one where its disk will be lost.

    colab, drive: whether this is Colab, and whether Drive is mounted; found out unless given.
    """
    colab = "google.colab" in sys.modules if colab is None else colab
    drive = DRIVE.is_dir() if drive is None else drive
    memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    size = f" ({memory / 2**30:.4g} GiB)" if memory else ""
    lines = [f"{len(devices)} x {devices[0].device_kind}{size} · jax {version}"]
    if colab and devices[0].platform == "cpu":
        lines.append(
            "No TPU: this notebook is on the CPU. Runtime > Change runtime type > v5e-1 TPU (or T4 GPU), then run again. "
            "(Or continue: everything runs on the CPU too, more slowly.)"
        )
    if colab and not drive:
        lines.append(f"Colab's disk is temporary: mount Drive and set {WORKDIR}={DRIVE}/jaxllm to keep the runs.")
    return lines
