"""A JobSet for Kubernetes (GKE) that runs an experiment on TPU slices or on GPU nodes, as text for kubectl.

python scripts/gke.py --name=big --image=IMAGE --accelerator=tpu-v5-lite-podslice --topology=4x4 --hosts=4 --chips=4 \
    --claim=runs -- pretrain --workdir=/runs/big --config.mesh.fsdp=16 | kubectl apply -f -
python scripts/gke.py --name=big --image=IMAGE --accelerator=nvidia-h100-80gb --hosts=4 --chips=8 --claim=runs -- \
    pretrain --workdir=/runs/big --config.mesh.data=4 --config.mesh.fsdp=8

--slices=2 makes two TPU slices of --hosts hosts each. --claim is a PersistentVolumeClaim that every pod can write (ReadWriteMany,
such as Filestore), mounted at /runs: the run directory lies there. The image holds this repository and its requirements, and
starts in its directory. The JobSet controller must be installed in the cluster. Code 75 (saved and resumable) and lost pods start
the whole set again, which continues; codes 2 (a user error) and 70 (a bug) end it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys

PORT = 12345

JOBSET = """apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {name}
{annotations}spec:
  failurePolicy:
    maxRestarts: {restarts}
    rules:
      - action: FailJobSet
        onJobFailureReasons:
          - PodFailurePolicy
  replicatedJobs:
    - name: job
      replicas: {slices}
      template:
        spec:
          parallelism: {hosts}
          completions: {hosts}
          completionMode: Indexed
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes:
                  containerName: jaxllm
                  operator: In
                  values: [2, 70]
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: {grace}
              nodeSelector:
{selector}
{tolerations}              containers:
                - name: jaxllm
                  image: {image}
                  command: {command}
{env}                  resources:
                    limits:
                      {resource}: {chips}
                  volumeMounts:
                    - name: runs
                      mountPath: /runs
                    - name: shm
                      mountPath: /dev/shm
              volumes:
                - name: runs
                  persistentVolumeClaim:
                    claimName: {claim}
                - name: shm
                  emptyDir:
                    medium: Memory
"""

TPU_SELECTOR = """                cloud.google.com/gke-tpu-accelerator: {accelerator}
                cloud.google.com/gke-tpu-topology: {topology}"""
GPU_SELECTOR = "                cloud.google.com/gke-accelerator: {accelerator}"
# a slice is a node pool of its own, and a job takes it whole
EXCLUSIVE = """  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
"""
GPU_TOLERATIONS = """              tolerations:
                - key: nvidia.com/gpu
                  operator: Exists
                  effect: NoSchedule
"""
# GKE tells TPU pods of their peers; GPU pods are told here, and take their index from the Indexed job
GPU_ENV = """                  env:
                    - name: JAX_COORDINATOR_ADDRESS
                      value: {address}
                    - name: JAX_NUM_PROCESSES
                      value: {count}
"""


def parser() -> argparse.ArgumentParser:
    """The flags."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--name", required=True, help="of the JobSet: small letters, digits and -")
    p.add_argument("--image", required=True)
    p.add_argument("--accelerator", required=True, help="the node label's value, such as tpu-v5p-slice or nvidia-h100-80gb")
    p.add_argument("--topology", default="", help="of a TPU slice, such as 4x4; none: GPUs")
    p.add_argument("--hosts", type=int, required=True, help="of a slice, or GPU nodes")
    p.add_argument("--chips", type=int, required=True, help="TPU chips or GPUs of a host")
    p.add_argument("--slices", type=int, default=1)
    p.add_argument("--claim", required=True, help="the PersistentVolumeClaim of the run directory, mounted at /runs")
    p.add_argument("--restarts", type=int, default=100)
    p.add_argument("--grace", type=int, default=120, help="seconds between SIGTERM and SIGKILL")
    p.add_argument("experiment", nargs="+", metavar="EXPERIMENT --workdir=DIR [--config...]")
    return p


def problems(a: argparse.Namespace) -> list[str]:
    """What is wrong with the flags."""
    found = []
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", a.name):
        found.append(f"--name={a.name}: use small letters, digits and -, at most 40 of them")
    if min(a.hosts, a.chips, a.slices) < 1:
        found.append(f"--hosts={a.hosts} --chips={a.chips} --slices={a.slices}: each is at least 1")
    if a.topology and not re.fullmatch(r"\d+x\d+(x\d+)?", a.topology):
        found.append(f"--topology={a.topology}: expected something like 4x4 or 2x2x4")
    elif a.topology and _product(a.topology) != a.hosts * a.chips:
        found.append(
            f"--topology={a.topology} has {_product(a.topology)} chips, {a.hosts} hosts of {a.chips} have {a.hosts * a.chips}"
        )
    if not a.topology and a.slices > 1:
        found.append(f"--slices={a.slices} is for TPUs: give --topology, or more --hosts")
    where = [x.partition("=")[2] for x in a.experiment if x.startswith("--workdir=")]
    if not where or not where[0].startswith("/runs/"):
        found.append("the experiment needs --workdir=/runs/NAME: all pods share that directory")
    return found


def _product(topology: str) -> int:
    total = 1
    for part in topology.split("x"):
        total *= int(part)
    return total


def render(a: argparse.Namespace) -> str:
    """The JobSet. Texts that a user gives are written as JSON, which YAML reads as such."""
    tpu = bool(a.topology)
    address = f"{a.name}-job-0-0.{a.name}:{PORT}"  # the first pod's name under the JobSet's headless service
    selector = (TPU_SELECTOR if tpu else GPU_SELECTOR).format(
        accelerator=json.dumps(a.accelerator), topology=json.dumps(a.topology)
    )
    return JOBSET.format(
        name=a.name, annotations=EXCLUSIVE if tpu else "", restarts=a.restarts, slices=a.slices, hosts=a.hosts, grace=a.grace,
        selector=selector, tolerations="" if tpu else GPU_TOLERATIONS, image=json.dumps(a.image), claim=json.dumps(a.claim),
        command=json.dumps(["python", "-m", f"experiments.{a.experiment[0]}", *a.experiment[1:]]),
        env="" if tpu or a.hosts == 1 else GPU_ENV.format(address=json.dumps(address), count=json.dumps(str(a.hosts))),
        resource="google.com/tpu" if tpu else "nvidia.com/gpu", chips=a.chips,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Print the JobSet, or what is wrong and 2."""
    given = parser().parse_args(argv)
    if found := problems(given):
        print("\n".join(f"error: {line}" for line in found), file=sys.stderr)
        return 2
    print(render(given), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
