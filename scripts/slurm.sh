#!/usr/bin/env bash
# A run of jaxllm on SLURM, one process a node (all of its GPUs), started again where it stopped.
#
#   sbatch --nodes=4 --gpus-per-node=8 --time=24:00:00 scripts/slurm.sh pretrain /shared/runs/big \
#       --config=configs/pretrain.py:gpt2 --config.data.path=/shared/corpus.jsonl --config.mesh.data=4 --config.mesh.fsdp=8
#
# Arguments: the experiment, the run directory (on a file system that every node sees), then flags of the experiment.
# Environment: JAXLLM_SETUP, a file to source on each node first (a virtual environment, modules); JAXLLM_RESTARTS, how often
# to start again at most (default 100). SLURM's own time limit, a preemption or a lost node end the job's step; SIGTERM, sent
# two minutes before the end, makes all processes save at the same step and leave with code 75.
#SBATCH --job-name=jaxllm
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=TERM@120

set -uo pipefail

if [ "$#" -lt 2 ]; then
  echo "usage: sbatch [--nodes=N ...] $0 EXPERIMENT RUN_DIRECTORY [--config... ...]" >&2
  exit 2
fi
experiment=$1
workdir=$2
shift 2

if [ -n "${JAXLLM_SETUP:-}" ]; then
  # shellcheck disable=SC1090
  source "$JAXLLM_SETUP" || exit 2
fi
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2

# the processes get the signals of srun; --kill-on-bad-exit ends them all when one is lost
srun --ntasks="${SLURM_NNODES:-1}" --ntasks-per-node=1 --kill-on-bad-exit=1 \
  python -m "experiments.$experiment" --workdir="$workdir" "$@"
code=$?

# 75: saved and resumable, or a peer was lost; 134 and 137: aborted or killed with a peer; 143: ended before the loop began
case $code in
  75 | 134 | 137 | 143)
    if [ "${SLURM_RESTART_COUNT:-0}" -lt "${JAXLLM_RESTARTS:-100}" ] && [ -n "${SLURM_JOB_ID:-}" ]; then
      echo "jaxllm: code $code, started again by scontrol requeue $SLURM_JOB_ID"
      scontrol requeue "$SLURM_JOB_ID" && exit 0
    fi
    ;;
esac
exit "$code"
