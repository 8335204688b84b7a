#!/usr/bin/env bash
# One command on several GPU nodes under SLURM, submitted from the repository's root, which all nodes share:
#   sbatch --nodes=4 launch/slurm.sh opensora_jax.train --config=configs/... --config.workdir=...
# Options of sbatch on the command line win over those below: partition, account, time and CPUs are yours to set.
#
# One process per GPU: jax.distributed gives each process under SLURM the one GPU that has the process's number on its
# node. So every process has to see all GPUs of the node: no --gpus-per-task, no --gpu-bind.
#SBATCH --job-name=opensora_jax
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
# Ten minutes before the time is up the processes get SIGTERM, save and end. The next element of the array continues
# there, one at a time; elements after the last step find a finished run and end at once.
#SBATCH --signal=TERM@600
#SBATCH --array=1-10%1
# A job whose node failed or that was preempted is put back into the queue.
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
REQUIREMENTS="requirements.txt requirements-gpu.txt"
source "${SLURM_SUBMIT_DIR:-.}/launch/env.sh"  # SLURM runs a copy of this script, which lies elsewhere
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"  # srun does not take it over from sbatch

exec srun --kill-on-bad-exit=1 --label bash launch/gpu_node.sh "$@"
