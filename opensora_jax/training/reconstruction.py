"""What a trained autoencoder makes of clips: the statistics of its latent, its reconstructions and their error.

The statistics are exact, from two sums in float64; the original's script subtracts a running mean and so measures no
variance.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, UInt8
from pyarrow.csv import write_csv

from opensora_jax.data.clip_source import ClipSource
from opensora_jax.data.clips import read_once
from opensora_jax.data.media.video_writer import write_video
from opensora_jax.data.plan.buckets import Bucket
from opensora_jax.models.codec import Codec
from opensora_jax.training.quality import psnr_db

Clip = UInt8[np.ndarray, "T H W 3"]


@dataclass(frozen=True)
class LatentSums:
    """Sums over latents drawn from (mean, variance), per channel in float64: their mean and deviation are exact.

    The spread of the draws counts too: a channel that the autoencoder hardly uses then stays small when the latent is
    normalised, instead of being blown up.
    """

    count: int = 0
    total: Float[np.ndarray, "*Z"] | list[float] | float = 0.0
    squares: Float[np.ndarray, "*Z"] | list[float] | float = 0.0

    def add(self, means: Float[np.ndarray, "*B Z"], variances: Float[np.ndarray, "*B Z"]) -> "LatentSums":
        """Returns the sums with these latents in them."""
        flat = np.asarray(means, np.float64).reshape(-1, means.shape[-1])
        squares = (flat**2 + np.asarray(variances, np.float64).reshape(flat.shape)).sum(0)
        return LatentSums(self.count + len(flat), np.asarray(self.total) + flat.sum(0), self.squares + squares)

    def result(self) -> tuple[list[float], list[float]]:
        """Returns the mean and standard deviation of each channel."""
        mean = np.asarray(self.total) / self.count
        return mean.tolist(), np.sqrt(np.maximum(np.asarray(self.squares) / self.count - mean**2, 1e-12)).tolist()

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain numbers."""
        return {
            "count": self.count,
            "total": np.asarray(self.total).tolist(),
            "squares": np.asarray(self.squares).tolist(),
        }


def latent_statistics(
    moments: Iterable[tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]],
) -> tuple[list[float], list[float]]:
    """Returns mean and standard deviation of each channel (the last axis) of latents drawn from (mean, variance)."""
    return reduce(lambda sums, pair: sums.add(*pair), moments, LatentSums()).result()


def measure_latent(codec: Codec, source: ClipSource, rows: list[tuple[Bucket, int]], batch_size: int) -> dict[str, Any]:
    """Returns the `shift_factor` and `scale_factor` per channel that give latents mean 0 and deviation 1."""
    batches = read_once(source, rows, batch_size, "latent statistics")
    kept = ([part[: len(ids)] for part in codec.moments(video)] for _, ids, video in batches)
    mean, std = latent_statistics((np.asarray(m), np.asarray(v)) for m, v in kept)
    return {"shift_factor": mean, "scale_factor": (1 / np.asarray(std)).tolist(), "clips": len(rows)}


def reconstruct(
    codec: Codec, source: ClipSource, rows: list[tuple[Bucket, int]], batch_size: int
) -> Iterator[tuple[int, Clip, Clip]]:
    """Yields (row, clip, reconstruction from the posterior's mode)."""
    for bucket, ids, video in read_once(source, rows, batch_size, "reconstructions"):
        decoded = codec.decode(codec.encode(video), bucket.num_frames)
        yield from zip(ids, video, np.asarray(decoded), strict=False)


def validate(
    codec: Codec,
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
    for row, clip, reconstruction in reconstruct(codec, source, rows, batch_size):
        errors.append(psnr_db(clip / 255, reconstruction / 255).mean())
        fps = source.facts["fps"][row].item()
        name = f"{row:05d}_{Path(str(source.paths[row])).stem}.mp4"
        path = write_video(folder / name, reconstruction, 1.0 if math.isnan(fps) else fps)
        lines.append({"path": path.name, "text": captions[row]})
    if not errors:
        return {"clips": 0}
    write_csv(pa.Table.from_pylist(lines), folder / "captions.csv")
    return {"psnr_db": float(np.mean(errors)), "psnr_db_worst": float(np.min(errors)), "clips": len(errors)}
