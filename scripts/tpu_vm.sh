#!/usr/bin/env bash
# A run of jaxllm on all hosts of a TPU VM (a slice), through ssh; the same command again continues it.
#
#   scripts/tpu_vm.sh NAME ZONE DIRECTORY pretrain /shared/runs/big --config=configs/pretrain.py:gpt2 --config.mesh.fsdp=16
#
# NAME and ZONE: of the TPU VM. DIRECTORY: this repository on every host, installed there with its `tpu` extra
# (pip install -e '.[tpu]'). Then the experiment, the run directory and flags. The run directory must be on a file system that
# all hosts mount (Filestore over NFS, say). Environment: JAXLLM_RESTARTS, how often to start again at most (default 0);
# JAXLLM_PYTHON, the interpreter on the hosts (default python3).

set -uo pipefail

if [ "$#" -lt 5 ]; then
  echo "usage: $0 NAME ZONE DIRECTORY EXPERIMENT RUN_DIRECTORY [--config... ...]" >&2
  exit 2
fi
name=$1
zone=$2
directory=$3
experiment=$4
workdir=$5
shift 5

# --coordinator=auto: jax asks the metadata server for the other hosts
remote="cd $(printf '%q' "$directory") && exec ${JAXLLM_PYTHON:-python3} -m experiments.$(printf '%q' "$experiment")"
remote="$remote --coordinator=auto --workdir=$(printf '%q' "$workdir")"
for argument in "$@"; do
  remote="$remote $(printf '%q' "$argument")"
done

restarts=0
while true; do
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$remote"
  code=$?
  # 75: saved and resumable; 134, 137: aborted or killed with a peer; 255: ssh lost the host
  case $code in
    75 | 134 | 137 | 255) ;;
    *) exit "$code" ;;
  esac
  if [ "$restarts" -ge "${JAXLLM_RESTARTS:-0}" ]; then
    echo "code $code: the same command continues the run" >&2
    exit "$code"
  fi
  restarts=$((restarts + 1))
  echo "code $code: start $restarts of at most $JAXLLM_RESTARTS more" >&2
  sleep 10
done
