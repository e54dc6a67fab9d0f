"""The launch scripts: they parse, refuse half a command, and the JobSet says what was asked for."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
TPU = [
    "--name=big", "--image=registry/x:1", "--accelerator=tpu-v5-lite-podslice", "--topology=4x4", "--hosts=4", "--chips=4",
    "--slices=2", "--claim=runs",
]  # fmt: skip
GPU = ["--name=big", "--image=registry/x:1", "--accelerator=nvidia-h100-80gb", "--hosts=4", "--chips=8", "--claim=runs"]
RUN = ["--", "pretrain", "--workdir=/runs/big", "--config.tokenizer=a 'b'"]


def gke(*argv):
    return subprocess.run([sys.executable, SCRIPTS / "gke.py", *argv], capture_output=True, text=True, timeout=60)


def values(text):
    """{path of keys: [values]} of a YAML of this shape: maps, lists of maps, scalars and inline lists."""
    found, stack = {}, []
    for line in text.splitlines():
        body = line.lstrip(" ")
        indent = len(line) - len(body)
        if body.startswith("- "):
            body, indent = body[2:], indent + 2
        assert indent % 2 == 0 and "\t" not in line, line
        key, _, value = body.partition(":")
        assert re.fullmatch(r"[\w./-]+", key) or not _, line
        while stack and stack[-1][0] >= indent:
            stack.pop()
        path = ".".join([*(k for _, k in stack), key])
        if value.strip():
            found.setdefault(path, []).append(value.strip())
        else:
            stack.append((indent, key))
    return found


@pytest.mark.parametrize("name", ["slurm.sh", "tpu_vm.sh"])
def test_shell_scripts_parse_and_say_what_they_need(name):
    bash = shutil.which("bash")
    assert subprocess.run([bash, "-n", SCRIPTS / name], timeout=20).returncode == 0
    done = subprocess.run([bash, SCRIPTS / name, "one"], capture_output=True, text=True, timeout=20)
    assert done.returncode == 2 and done.stderr.startswith("usage: ")


@pytest.mark.parametrize(("first", "restarts", "code"), [(0, "3", 0), (75, "3", 0), (75, "0", 75), (2, "3", 2)])
def test_the_tpu_script_starts_again_only_what_can_continue(tmp_path, first, restarts, code):
    fake = tmp_path / "gcloud"
    fake.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n[ "$(wc -l < {tmp_path}/calls)" -gt 1 ] && exit 0\nexit {first}\n'
    )
    (tmp_path / "sleep").write_text("#!/bin/sh\n")
    for tool in (fake, tmp_path / "sleep"):
        tool.chmod(0o755)
    command = ["bash", SCRIPTS / "tpu_vm.sh", "v", "z", "/code dir", "pretrain", "/runs/x", "--config.data.path=a b"]
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "JAXLLM_RESTARTS": restarts}
    assert subprocess.run(command, env=env, capture_output=True, timeout=30).returncode == code
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == (2 if first == 75 and code == 0 else 1)
    assert calls[0].startswith("compute tpus tpu-vm ssh v --zone=z --worker=all --command=cd /code\\ dir && exec python3 -m")
    assert "--coordinator=auto --workdir=/runs/x --config.data.path=a\\ b" in calls[0]


@pytest.mark.parametrize(("code", "again"), [(0, False), (2, False), (75, True), (137, True)])
def test_the_slurm_script_requeues_what_can_continue(tmp_path, code, again):
    (tmp_path / "srun").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/ran\nexit {code}\n')
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/queued\n')
    for tool in ("srun", "scontrol"):
        (tmp_path / tool).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_NNODES": "4", "SLURM_SUBMIT_DIR": str(tmp_path)}
    command = ["bash", SCRIPTS / "slurm.sh", "dpo", "/runs/x", "--config.steps=3"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == (0 if again else code)
    assert (tmp_path / "ran").read_text() == (
        "--ntasks=4 --ntasks-per-node=1 --kill-on-bad-exit=1 python -m experiments.dpo --workdir=/runs/x --config.steps=3\n"
    )
    assert (tmp_path / "queued").exists() == again
    env["SLURM_RESTART_COUNT"] = "100"
    assert subprocess.run(command, env=env, capture_output=True, timeout=30).returncode == code  # not for ever


def test_a_jobset_for_tpus():
    done = gke(*TPU, *RUN)
    found = values(done.stdout)
    job = "spec.replicatedJobs.template.spec"
    pod = f"{job}.template.spec"
    assert done.returncode == 0 and found["kind"] == ["JobSet"] and found["metadata.name"] == ["big"]
    assert found["spec.replicatedJobs.replicas"] == ["2"] and found[f"{job}.parallelism"] == found[f"{job}.completions"] == ["4"]
    assert found[f"{pod}.nodeSelector.cloud.google.com/gke-tpu-topology"] == ['"4x4"']
    assert found[f"{pod}.containers.resources.limits.google.com/tpu"] == ["4"]
    command = json.loads(found[f"{pod}.containers.command"][0])
    assert command == ["python", "-m", "experiments.pretrain", *RUN[2:]]
    assert "JAX_COORDINATOR_ADDRESS" not in done.stdout  # GKE names the hosts


def test_a_jobset_for_gpus_names_the_coordinator():
    found = values(gke(*GPU, *RUN).stdout)
    env = "spec.replicatedJobs.template.spec.template.spec.containers.env"
    assert found[f"{env}.name"] == ["JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES"]
    assert found[f"{env}.value"] == ['"big-job-0-0.big:12345"', '"4"']


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*TPU, "--hosts=2", *RUN], "--topology=4x4 has 16 chips, 2 hosts of 4 have 8"),
        ([*TPU, "--topology=16", *RUN], "expected something like 4x4"),
        ([*GPU, "--slices=2", *RUN], "--slices=2 is for TPUs"),
        ([*GPU, "--name=Big_one", *RUN], "use small letters"),
        ([*GPU, "--", "pretrain"], "the experiment needs --workdir=/runs/NAME"),
    ],
)
def test_jobsets_that_cannot_run_are_refused(argv, message):
    done = gke(*argv)
    assert done.returncode == 2 and message in done.stderr and not done.stdout


def test_the_jobset_is_yaml():
    yaml = pytest.importorskip("yaml")
    for argv in (TPU, GPU):
        spec = yaml.safe_load(gke(*argv, *RUN).stdout)["spec"]
        pod = spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        assert pod["containers"][0]["command"][-1] == RUN[-1] and pod["restartPolicy"] == "Never"
