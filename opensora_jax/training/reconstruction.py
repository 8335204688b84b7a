"""What an autoencoder makes of clips: the statistics of its latent, its reconstructions and their error.

Clips of which it makes NaN are left out and counted, like those that cannot be read.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, UInt8
from pyarrow.csv import write_csv

from opensora_jax.config.errors import UserError
from opensora_jax.data.clip_source import ClipSource
from opensora_jax.data.clips import read_once
from opensora_jax.data.media.transforms import target_fps
from opensora_jax.data.media.video import VideoError
from opensora_jax.data.media.video_writer import write_video
from opensora_jax.data.plan.buckets import Bucket
from opensora_jax.models.codec import Codec, are_finite, to_bytes
from opensora_jax.training.latent_sums import LatentSums
from opensora_jax.training.quality import psnr_db

Clip = UInt8[np.ndarray, "T H W 3"]
Rows = Sequence[tuple[Bucket, int]]


def clip_moments(
    codec: Codec, source: ClipSource, rows: Rows, batch_size: int
) -> Iterator[tuple[list[int], Float[np.ndarray, "N ..."], Float[np.ndarray, "N ..."]]]:
    """Yields the rows of a batch of clips, and means and variances of the unscaled latents of those that have any."""
    for _, ids, video in read_once(source, rows, batch_size, "latent statistics"):
        moments = codec.moments(video)
        good = np.asarray(are_finite(moments[0]) & are_finite(moments[1]))[: len(ids)]
        _refuse(source, ids, good, "its latent is NaN or infinite")
        mean, variance = (np.asarray(part)[: len(ids)][good] for part in moments)
        yield ids, mean, variance


def measure_latent(codec: Codec, source: ClipSource, rows: Rows, batch_size: int) -> dict[str, Any]:
    """Returns the `shift_factor` and `scale_factor` per channel that give latents mean 0 and deviation 1.

    `clips` says of how many. Raises: UserError where there are none.
    """
    sums, clips = LatentSums(), 0
    for _, mean, variance in clip_moments(codec, source, rows, batch_size):
        sums, clips = sums.add(mean, variance), clips + len(mean)
    if not clips:
        raise UserError(f"none of the {len(rows)} clips has a latent to measure: see the warnings above")
    return per_channel(*sums.result()) | {"clips": clips}


def per_channel(mean: list[float], std: list[float]) -> dict[str, Any]:
    """Returns the fields that subtract the mean and divide by the deviation, channel by channel."""
    return {"shift_factor": mean, "scale_factor": (1 / np.asarray(std)).tolist()}


def as_one(mean: list[float], std: list[float]) -> dict[str, Any]:
    """Returns the one number that the DC-AE divides by: the deviation of all values together."""
    squares = np.mean(np.square(std) + np.square(mean))
    return {"scaling_factor": float(np.sqrt(squares - np.mean(mean) ** 2))}


# the fields that normalise latents, by the autoencoder's type in configs
NORMALISATION: dict[str, Callable[[list[float], list[float]], dict[str, Any]]] = {
    "hunyuan_vae": per_channel,
    "flux_ae": per_channel,
    "opensora_vae": lambda mean, std: {"shift": mean, "scale": std},
    "dc_ae": as_one,
}


def reconstruct(codec: Codec, source: ClipSource, rows: Rows, batch_size: int) -> Iterator[tuple[int, Clip, Clip]]:
    """Yields (row, clip, reconstruction from the posterior's mode), both in bytes."""
    for _, ids, video in read_once(source, rows, batch_size, "reconstruct"):
        decoded, good = codec.reconstruct(video)
        _refuse(source, ids, good, "its latent or its reconstruction is NaN or infinite")
        found = zip(ids, np.asarray(to_bytes(video)), np.asarray(decoded), good, strict=False)  # copies fill a batch up
        yield from ((row, clip, made) for row, clip, made, is_good in found if is_good)


def shown_fps(source: ClipSource, row: int) -> float:
    """Returns the frame rate at which the frames read of a clip look as fast as it does; 1 for an image."""
    fps, _ = target_fps(source.facts["fps"][row].item(), source.fps_max)
    return float(fps) or 1.0


def validate(
    codec: Codec,
    source: ClipSource,
    rows: Rows,
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
        name = f"{row:05d}_{Path(str(source.paths[row])).stem}.mp4"
        path = write_video(folder / name, reconstruction, shown_fps(source, row))
        lines.append({"path": path.name, "text": captions[row]})
    if not errors:
        return {"clips": 0}
    write_csv(pa.Table.from_pylist(lines), folder / "captions.csv")
    return {"psnr_db": float(np.mean(errors)), "psnr_db_worst": float(np.min(errors)), "clips": len(errors)}


def _refuse(source: ClipSource, ids: list[int], good: Bool[np.ndarray, " B"], why: str) -> None:
    """Counts and names the clips that are not good. Raises: UserError when they are too many."""
    for row in (row for row, is_good in zip(ids, good, strict=False) if not is_good):
        source.refuse(row, VideoError(why))
