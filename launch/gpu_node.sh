#!/usr/bin/env bash
# One command on all GPUs of this machine: bash launch/gpu_node.sh opensora_jax.train --config=configs/...
#   CUDA_VISIBLE_DEVICES=0,1    some of them
#   XLA_FLAGS="..."             your own flags; they come last, so they win
set -euo pipefail
REQUIREMENTS="requirements.txt requirements-gpu.txt"
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

# Collectives run while the device computes. Off in XLA by default; what it gives was not measured here.
export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true ${XLA_FLAGS:-}"

exec python -m "$@"
