"""Which processes a run has: from flags or from what SLURM, Open MPI, Kubernetes and Cloud TPU put into the environment."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

FLAGS = {"coordinator": "", "processes": 0, "process": -1}
AUTO = "JAXLLM_PROCESSES"  # =auto: jax finds the others itself, as on a TPU VM, whose environment names none
COUNTS = ("JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
INDICES = ("JAX_PROCESS_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "JOB_COMPLETION_INDEX")
HELP = "[--coordinator=HOST:PORT --processes=N --process=I | --coordinator=auto]"
# seconds: a silent process is given up after a minute; nodes of a large job start minutes apart
TIMEOUTS = {"heartbeat_timeout_seconds": 60, "initialization_timeout": 600}


def flag_environment(coordinator: str, processes: int, process: int) -> dict[str, str]:
    """The environment that the flags --coordinator, --processes and --process mean. ValueError when they do not fit."""
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    named = {name: value for name, value in given.items() if value != FLAGS[name]}
    if not named:
        return {}
    if named == {"coordinator": "auto"}:
        return {AUTO: "auto"}
    if missing := [name for name in FLAGS if name not in named]:
        said = " ".join(f"--{name}={value}" for name, value in named.items())
        raise ValueError(
            f"{said}: also give {' and '.join(f'--{name}' for name in missing)} "
            "(--coordinator=host:port of process 0, --processes=how many, --process=which, from 0), or --coordinator=auto alone"
        )
    _check(coordinator, processes, process, "--coordinator, --processes and --process")
    return {"JAX_COORDINATOR_ADDRESS": coordinator, "JAX_NUM_PROCESSES": str(processes), "JAX_PROCESS_ID": str(process)}


def distributed_arguments(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of jax.distributed.initialize, {} where jax finds them itself, None for a single process."""
    if environ.get(AUTO) == "auto":
        return {}
    if environ.get("JAX_COORDINATOR_ADDRESS"):
        return _explicit(environ)
    # SLURM_NTASKS also stands in a batch script that srun has not split: only the step's count means peers
    if _number(environ, "SLURM_STEP_NUM_TASKS", 1) > 1 and "SLURM_PROCID" in environ:
        return _slurm(environ)
    if _number(environ, "OMPI_COMM_WORLD_SIZE", 1) > 1:
        if "OMPI_MCA_orte_hnp_uri" in environ:
            return {}
        raise ValueError(
            "Open MPI 5 does not say where process 0 runs: set JAX_COORDINATOR_ADDRESS=host:port "
            "(and mpirun -x JAX_COORDINATOR_ADDRESS)"
        )
    return {} if _tpu_hosts(environ) > 1 else None


def _explicit(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """A coordinator that was given; count and index too, or from the launcher."""
    found = [next((name for name in names if name in environ), None) for names in (COUNTS, INDICES)]
    if missing := [names[0] for names, name in zip((COUNTS, INDICES), found, strict=True) if name is None]:
        raise ValueError(f"JAX_COORDINATOR_ADDRESS is set: also set {' and '.join(missing)}")
    address = environ["JAX_COORDINATOR_ADDRESS"]
    count, index = (_number(environ, str(name)) for name in found)
    if count == 1:
        return None
    _check(address, count, index, f"JAX_COORDINATOR_ADDRESS, {found[0]} and {found[1]}")
    arguments = {"coordinator_address": address, "num_processes": count, "process_id": index}
    # jax would ask the Kubernetes API for what it was just told
    return arguments | ({"cluster_detection_method": "deactivate"} if "KUBERNETES_SERVICE_HOST" in environ else {})


def _slurm(environ: Mapping[str, str]) -> dict[str, Any]:
    """jax gives each task of a SLURM step one GPU; a task that has its node to itself takes all of them."""
    alone = re.fullmatch(r"1(\(x\d+\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    gpus = _number(environ, "SLURM_GPUS_ON_NODE", 0)
    return {"local_device_ids": list(range(gpus))} if alone and gpus > 1 else {}


def _tpu_hosts(environ: Mapping[str, str]) -> int:
    """Hosts of a TPU job on GKE, over all slices."""
    names = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or ""
    return max(1, len([n for n in names.split(",") if n.strip()])) * _number(environ, "MEGASCALE_NUM_SLICES", 1)


def _number(environ: Mapping[str, str], name: str, default: int = 0) -> int:
    text = environ.get(name) or str(default)
    if not text.isdigit():
        raise ValueError(f"{name}={text}: expected a whole number, 0 or more")
    return int(text)


def _check(address: str, count: int, index: int, names: str) -> None:
    if not re.fullmatch(r"\S+:\d+", address):
        raise ValueError(f"{names}: {address!r} is no address, expected host:port, such as node001:12345")
    if count < 1 or not 0 <= index < count:
        raise ValueError(f"{names}: process {index} of {count}: processes count from 0 to {max(count, 1) - 1}")
