"""Which processes a run has, as flags and the environments of launchers say it."""

import pytest

from jaxllm import cluster, settings

EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
FOUND = {"coordinator_address": "h:1", "num_processes": 2, "process_id": 1}
SLURM = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        (EXPLICIT, FOUND),
        (EXPLICIT | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        (SLURM, {}),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # a batch script that srun has not split
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8(x4)", "SLURM_GPUS_ON_NODE": "8"}, {}),  # jax takes one GPU a task
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_GPUS_ON_NODE": "4"}, {"local_device_ids": [0, 1, 2, 3]}),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, {}),  # no GPUs
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "h:1"}, FOUND | {"num_processes": 4}),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:9"}, {}),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "JAX_COORDINATOR_ADDRESS": "h:1"}, FOUND),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, {}),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, {}),
        ({"JAXLLM_PROCESSES": "auto"}, {}),  # a TPU VM, whose environment names no other host
        (
            {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JOB_COMPLETION_INDEX": "1"}
            | {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
            FOUND | {"cluster_detection_method": "deactivate"},
        ),
        ({"JOB_COMPLETION_INDEX": "1", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a job of independent pods
    ],
)
def test_environments(environ, expected):
    assert cluster.distributed_arguments(environ) == expected


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, "also set JAX_NUM_PROCESSES and JAX_PROCESS_ID"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2"}, "also set JAX_PROCESS_ID"),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "h"}, "'h' is no address, expected host:port"),
        (EXPLICIT | {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two: expected a whole number"),
        (EXPLICIT | {"JAX_PROCESS_ID": "2"}, "process 2 of 2: processes count from 0 to 1"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "set JAX_COORDINATOR_ADDRESS=host:port"),
    ],
)
def test_environments_that_do_not_say_enough(environ, message):
    with pytest.raises(ValueError, match=message) as error:
        cluster.distributed_arguments(environ)
    assert "\n" not in str(error.value)


def test_flags_are_the_explicit_environment():
    assert cluster.flag_environment("", 0, -1) == {}
    assert cluster.flag_environment("h:1", 2, 1) == EXPLICIT
    assert cluster.distributed_arguments(cluster.flag_environment("auto", 0, -1)) == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("h:1", 0, -1), "--coordinator=h:1: also give --processes and --process "),
        (("", 2, -1), "--processes=2: also give --coordinator and --process "),
        (("", 0, 1), "--process=1: also give --coordinator and --processes "),
        (("auto", 2, -1), "--coordinator=auto --processes=2: also give --process "),
        (("h:1", 2, 2), "process 2 of 2"),
        (("h", 2, 0), "'h' is no address"),
    ],
)
def test_half_the_flags_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        cluster.flag_environment(*given)


def test_the_command_line_takes_them():
    argv = ["--coordinator=h:1", "--processes=2", "--process=1", "--workdir=w"]
    assert settings.parse(argv, "pretrain", {}).processes == EXPLICIT
    with pytest.raises(ValueError, match="also give --process "):
        settings.parse(argv[:2], "pretrain", {})
    assert "--coordinator=HOST:PORT" in settings.help_text("pretrain", "", {})
