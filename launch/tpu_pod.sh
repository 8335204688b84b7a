#!/usr/bin/env bash
# One command on every worker of a TPU VM slice that exists already:
#   TPU_NAME=my-pod ZONE=us-east5-a PROJECT=my-project bash launch/tpu_pod.sh opensora_jax.train --config=configs/...
# It copies the checked-out commit to ~/opensora_jax of each worker, installs there, starts the command, shows its log
# and ends with the status of each worker. The command goes on when this script or its connection ends (docs/launch.md
# says how to follow and how to stop it). A slice of several workers needs `ssh-add ~/.ssh/google_compute_engine` first.
#   TPU_NAME, ZONE, PROJECT    which slice: all three are needed
#   CACHE=<folder>             one that all workers share, for compiled programs: only the first worker writes them
#   DRY_RUN=1                  print the commands, run none
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 1
}

step() {
    printf '\n$'
    printf ' %q' "$@"
    printf '\n'
    [ -n "${DRY_RUN:-}" ] || "$@"
}

for name in TPU_NAME ZONE PROJECT; do
    [ -n "${!name:-}" ] || fail "$name is not set: give TPU_NAME, ZONE and PROJECT of a TPU VM slice that exists"
done
[ $# -gt 0 ] || fail "no command given: name a module and its flags, as in opensora_jax.train --config=configs/..."
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -z "$(git status --porcelain)" ] || echo "note: changes and new files that are not committed stay here" >&2

workers=(--worker=all "--zone=$ZONE" "--project=$PROJECT")
archive=${TMPDIR:-/tmp}/opensora_jax-$TPU_NAME.tar.gz

# In single quotes: the shells of the workers expand it, in their home folders.
is_running='kill -0 "$(cat opensora_jax/run.pid 2>/dev/null)" 2>/dev/null'
refuse='{ echo "error: $(hostname) still runs the last command: stop it first" >&2; exit 1; }'
unpack='cd opensora_jax && rm -rf opensora_jax configs run.pid run.status && tar -xzf ../opensora_jax.tar.gz'
install='bash launch/tpu_worker.sh'
start=$(printf '%q ' env ${CACHE:+"JAX_COMPILATION_CACHE_DIR=$CACHE"} bash opensora_jax/launch/tpu_worker.sh "$@")
status='echo "$(hostname): status $(cat opensora_jax/run.status 2>/dev/null || echo unknown, it may still run)"'

step git archive --format=tar.gz --output="$archive" HEAD
step gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:opensora_jax.tar.gz" "${workers[@]}"
step gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${workers[@]}" \
    --command="! $is_running || $refuse; mkdir -p opensora_jax && $unpack && $install"
code=0
step gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${workers[@]}" --command="$start" || code=$?
step gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${workers[@]}" --command="$status"
exit "$code"
