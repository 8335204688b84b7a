#!/usr/bin/env bash
# One command on all GPUs of this machine: bash launch/gpu_node.sh opensora_jax.train --config=configs/...
#   CUDA_VISIBLE_DEVICES=0,1    some of them
#   XLA_FLAGS="..."             your own flags; they come last, so they win
#   XLA_CLIENT_MEM_FRACTION     part of each GPU's memory that JAX takes at the start: 0.9 here, 0.75 is JAX's default
set -euo pipefail
REQUIREMENTS="requirements.txt requirements-gpu.txt"
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

# Collectives run while the device computes. Off in XLA by default; what it gives was not measured here.
export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true ${XLA_FLAGS:-}"
export XLA_CLIENT_MEM_FRACTION="${XLA_CLIENT_MEM_FRACTION:-0.9}"

exec python -m "$@"
