#!/usr/bin/env bash
# The whole way in one command: videos -> table -> text encoders -> autoencoder -> latents -> model -> samples.
# Run it again and finished steps are reused.
#   DATA=<folder of videos, or csv with path,text>   your own videos; without it, a small set of moving shapes is made
#   OUT=<folder>                                     place for the results: outputs/demo, or outputs/<name of DATA>
#   PROMPTS=<file, one prompt a line>                what to sample: the held-out prompts, or captions of your videos
set -euo pipefail
from_here() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac }  # env.sh changes the folder

DATA=${DATA:+$(from_here "$DATA")}
OUT=${OUT:+$(from_here "$OUT")}
PROMPTS=${PROMPTS:+$(from_here "$PROMPTS")}
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

step() {
    printf '\n$ %s\n' "$*"
    "$@"
}

if [ -n "$DATA" ]; then
    if [ -d "$DATA" ]; then
        name=$(basename "$(cd "$DATA" && pwd)")
    else
        name=$(basename "${DATA%.*}")
    fi
    OUT=${OUT:-outputs/$name}
    prompts=(--config.dataset.data_path="$OUT/meta.parquet" --config.num_samples=8)
    held_out=  # some of your clips are held out instead
else
    OUT=${OUT:-outputs/demo}
    prompts=(--prompts="$OUT/data/prompts.txt")
    held_out=$OUT/held_out.parquet
    step python -m opensora_jax.dataset demo --output="$OUT/data"
    step python -m opensora_jax.dataset meta --input="$OUT/data/held_out.csv" --output="$held_out"
fi
if [ -n "$PROMPTS" ]; then
    prompts=(--prompts="$PROMPTS")
fi

step python -m opensora_jax.dataset meta --input="${DATA:-$OUT/data/captions.csv}" --output="$OUT/meta.parquet"
step python -m opensora_jax.dataset text --meta="$OUT/meta.parquet" --output="$OUT/text"
step python -m opensora_jax.train_vae --config=configs/vae/train/demo.py --config.folder="$OUT" \
    --config.validation.data_path="$held_out"
step python -m opensora_jax.dataset encode --config=configs/diffusion/train/demo.py --config.folder="$OUT"
step python -m opensora_jax.train --config=configs/diffusion/train/demo.py --config.folder="$OUT"
step python -m opensora_jax.sample --config=configs/diffusion/inference/demo.py --config.folder="$OUT" "${prompts[@]}"
step python -m opensora_jax.report --folder="$OUT" --wall_seconds="$SECONDS"
