"""The clips of a table: how a config describes them, and reading each of them once, in batches of one bucket."""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Shaped
from tqdm import tqdm

from opensora_jax.data.clip_source import RESIZE, Captions, ClipSource
from opensora_jax.data.loader import Batch
from opensora_jax.data.media.video import VideoError
from opensora_jax.data.plan.buckets import Bucket, Buckets
from opensora_jax.data.plan.plan import mix
from opensora_jax.data.synthetic import is_synthetic, read_synthetic, synthetic_table
from opensora_jax.data.table.records import read_table

READ_THREADS = max(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class ClipDataset:
    """A config's `dataset` section: the table made by `dataset meta`, and how its clips are read.

    `data_path` may be "synthetic:10000", which needs no files. `spatial_unit` divides all heights and widths: the
    autoencoder's stride times the denoiser's patch. `resize` is "ffmpeg" (antialiased) or "original" (the arithmetic of
    Open-Sora 2.0, slower).
    """

    data_path: str
    fps_max: float
    spatial_unit: int
    resize: str
    cache_bytes: int
    max_bad_rate: float

    def __post_init__(self):
        """Refuse what no clip can be read by."""
        if self.resize not in RESIZE:
            raise ValueError(f"resize is one of {', '.join(RESIZE)}: got {self.resize!r}.")
        if not 0 <= self.max_bad_rate <= 1:
            raise ValueError(f"max_bad_rate is a share of the reads, 0 to 1: got {self.max_bad_rate}.")

    def table(self) -> pa.Table:
        """Returns the clips. Raises: UserError when there is no such table."""
        return synthetic_table(self.data_path) if is_synthetic(self.data_path) else read_table(self.data_path)

    def buckets(self, bucket_config: Mapping[str, Any]) -> Buckets:
        """Returns the buckets that a config gives its clips. Raises: UserError for lines that are none."""
        return Buckets(bucket_config, spatial_unit=self.spatial_unit, fps_max=self.fps_max)

    def source(self, table: pa.Table, captions: Captions | None = None) -> ClipSource:
        """Returns the reader of a table's clips, with the tokens of their captions where those are given."""
        return ClipSource(
            table,
            read_synthetic if is_synthetic(self.data_path) else RESIZE[self.resize],
            fps_max=self.fps_max,
            cache_bytes=self.cache_bytes,
            max_bad_rate=self.max_bad_rate,
            captions=captions,
        )


@dataclass(frozen=True)
class ImageSteps:
    """The first `steps` steps see `frames` frames of every clip, each as an image of its own; 0 steps: none."""

    steps: int
    frames: int

    def __post_init__(self):
        """Refuse what no batch can give."""
        if self.steps < 0 or self.frames < 1:
            raise ValueError(f"images needs steps >= 0 and frames >= 1: got {self.steps} and {self.frames}.")

    def apply(self, batches: Iterator[Batch], seed: int) -> Iterator[Batch]:
        """Yields the batches, the early ones with (B * frames, 1, H, W, 3) videos.

        Which frames are taken depends on the seed, the step and the sample alone; at most all of a clip.
        """
        for batch in batches:
            if int(batch["step"]) >= self.steps:
                yield batch
                continue
            video, ids = batch["video"], batch["sample_id"].astype(np.uint64)
            count = min(self.frames, video.shape[1])
            draws = mix(seed, int(batch["step"]), ids[:, None], np.arange(video.shape[1])[None])
            chosen = np.sort(np.argsort(draws, axis=1)[:, :count], axis=1)
            images = np.take_along_axis(video, chosen[:, :, None, None, None], axis=1)
            yield batch | {
                "video": images.reshape(-1, 1, *video.shape[2:]),
                "sample_id": np.repeat(batch["sample_id"], count),
            }

    def examples(self, batches: dict[str, Batch]) -> dict[str, Batch]:
        """Returns named batches of step 0 together with what `apply` makes of them."""
        if not self.steps:
            return batches
        images = {f"{name}, as images": next(self.apply(iter([batch]), 0)) for name, batch in batches.items()}
        return images | batches


def assigned_rows(table: pa.Table, buckets: Buckets, seed: int) -> list[tuple[Bucket, int]]:
    """Returns (bucket, row) of every row that has a bucket, bucket by bucket. Raises: UserError if none has."""
    assignment = buckets.assign(table, seed=seed)
    order = np.argsort(assignment.bucket, kind="stable")
    order = order[assignment.bucket[order] >= 0]
    return [
        (assignment.buckets[b], row) for b, row in zip(assignment.bucket[order].tolist(), order.tolist(), strict=True)
    ]


def read_once(
    source: ClipSource, rows: Sequence[tuple[Bucket, int]], batch_size: int, title: str
) -> Iterator[tuple[Bucket, list[int], Shaped[np.ndarray, "B T H W 3"]]]:
    """Yields (bucket, rows, clips) in order, each clip from the start that seed 0 draws.

    A short batch is filled up with copies of its last clip, so that one compiled program serves all. Clips that
    cannot be read are left out and counted. Raises: UserError when they are too many.
    """
    with tqdm(total=len(rows), desc=title, unit="clip") as bar:
        yield from read_batches(source, rows, batch_size, bar)


def read_batches(
    source: ClipSource, rows: Sequence[tuple[Bucket, int]], batch_size: int, bar: tqdm
) -> Iterator[tuple[Bucket, list[int], Shaped[np.ndarray, "B T H W 3"]]]:
    """Does as `read_once` under the progress bar of a larger piece of work."""
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for bucket, group in groupby(rows, key=lambda pair: pair[0]):
            ids = [row for _, row in group]
            for start in range(0, len(ids), batch_size):
                part = ids[start : start + batch_size]
                read = pool.map(lambda row, bucket=bucket: _read(source, bucket, row), part)
                good = [(row, clip) for row, clip in zip(part, read, strict=True) if clip is not None]
                if good:
                    clips = [clip for _, clip in good]
                    clips += clips[-1:] * (batch_size - len(clips))
                    yield bucket, [row for row, _ in good], np.stack(clips)
                bar.update(len(part))


def _read(source: ClipSource, bucket: Bucket, row: int) -> Shaped[np.ndarray, "T H W 3"] | None:
    try:
        return source.read(row, bucket, 0)["video"]
    except VideoError as error:
        source.refuse(row, error)
        return None
