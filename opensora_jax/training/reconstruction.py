"""What a trained autoencoder makes of clips: the statistics of its latent, its reconstructions and their error.

The statistics are exact, from two sums in float64; the original's script subtracts a running mean and so measures no
variance.
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jaxtyping import Float, UInt8
from pyarrow.csv import write_csv

from opensora_jax.data.buckets import Bucket
from opensora_jax.data.clips import read_once
from opensora_jax.data.loader import ClipSource
from opensora_jax.data.video import write_video
from opensora_jax.training.quality import psnr_db
from opensora_jax.training.vae import to_bytes, to_pixels

_pixels, _bytes = jax.jit(to_pixels), jax.jit(to_bytes)
Clip = UInt8[np.ndarray, "T H W 3"]


def latent_statistics(
    posteriors: Iterable[tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]],
) -> tuple[list[float], list[float]]:
    """Returns the mean and standard deviation of each channel (the last axis) of latents drawn from (mean, variance).

    The spread of the draws counts too: a channel that the autoencoder hardly uses then stays small when the latent is
    normalised, instead of being blown up.
    """
    count, total, squares = 0, np.zeros(()), np.zeros(())
    for means, variances in posteriors:
        means = np.asarray(means, np.float64).reshape(-1, means.shape[-1])
        count += len(means)
        total = total + means.sum(0)
        squares = squares + (means**2 + np.asarray(variances, np.float64).reshape(means.shape)).sum(0)
    mean = total / count
    return mean.tolist(), np.sqrt(np.maximum(squares / count - mean**2, 1e-12)).tolist()


def measure_latent(model: Any, source: ClipSource, rows: list[tuple[Bucket, int]], batch_size: int) -> dict[str, Any]:
    """Returns the `shift_factor` and `scale_factor` per channel that give latents mean 0 and deviation 1."""

    def moments(video):
        posterior = model.posterior(_pixels(video))
        return posterior.mean, jnp.exp(posterior.logvar)

    batches = read_once(source, rows, batch_size, "latent statistics")
    kept = ([part[: len(ids)] for part in moments(video)] for _, ids, video in batches)
    mean, std = latent_statistics((np.asarray(m), np.asarray(v)) for m, v in kept)
    return {"shift_factor": mean, "scale_factor": (1 / np.asarray(std)).tolist(), "clips": len(rows)}


def reconstruct(
    model: Any, source: ClipSource, rows: list[tuple[Bucket, int]], batch_size: int
) -> Iterator[tuple[int, Clip, Clip]]:
    """Yields (row, clip, reconstruction from the posterior's mode)."""
    for _, ids, video in read_once(source, rows, batch_size, "reconstructions"):
        decoded = model.decode(model.encode(_pixels(video)))
        yield from zip(ids, video, np.asarray(_bytes(decoded)), strict=False)


def validate(
    model: Any,
    source: ClipSource,
    rows: list[tuple[Bucket, int]],
    captions: list[str],
    batch_size: int,
    folder: Path,
) -> dict[str, Any]:
    """Writes every clip's reconstruction into `folder`, with their captions in captions.csv; returns their PSNR.

    `captions` are those of all rows of the table. Files are named after the row and the clip. Where no clip can be
    read there is nothing to measure: `clips` is 0.
    """
    folder.mkdir(parents=True, exist_ok=True)
    errors, lines = [], []
    for row, clip, reconstruction in reconstruct(model, source, rows, batch_size):
        errors.append(psnr_db(clip / 255, reconstruction / 255).mean())
        fps = source.facts["fps"][row].item()
        name = f"{row:05d}_{Path(str(source.paths[row])).stem}.mp4"
        path = write_video(folder / name, reconstruction, 1.0 if math.isnan(fps) else fps)
        lines.append({"path": path.name, "text": captions[row]})
    if not errors:
        return {"clips": 0}
    write_csv(pa.Table.from_pylist(lines), folder / "captions.csv")
    return {"psnr_db": float(np.mean(errors)), "psnr_db_worst": float(np.min(errors)), "clips": len(errors)}
