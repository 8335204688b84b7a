"""Clips made of numbers instead of files, for benchmarks and dry runs: `dataset.data_path = "synthetic:10000"`.

The table is that of a real collection in its mix of sizes, rates, lengths and images. The pixels cost next to nothing,
so that what is measured is the rest.
"""

from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int, UInt8

from opensora_jax.config.errors import UserError
from opensora_jax.data.media.clip_bytes import Clip
from opensora_jax.data.media.video import VideoInfo
from opensora_jax.data.table.records import SCHEMA

PREFIX = "synthetic:"
SIZES = ((1080, 1920), (720, 1280), (1920, 1080), (480, 854), (1080, 1080), (480, 640), (360, 640), (256, 256))
RATES = (23.976, 24.0, 25.0, 29.97, 30.0, 60.0)
IMAGES = 0.1  # of all clips
SECONDS = (1.0, 20.0)


def is_synthetic(data_path: str) -> bool:
    """Returns whether a `data_path` asks for synthetic clips."""
    return data_path.startswith(PREFIX)


def synthetic_table(data_path: str, *, seed: int = 0) -> pa.Table:
    """Returns a table as `records.read_table` gives it, with the clips that "synthetic:10000" asks for.

    Raises: UserError for a path without their number.
    """
    digits = data_path.removeprefix(PREFIX)
    if not digits.isdecimal() or int(digits) < 1:
        raise UserError(f'data_path "{data_path}" does not say how many clips: write "{PREFIX}10000"')
    count, rng = int(digits), np.random.default_rng(seed)
    size = np.array(SIZES)[rng.integers(len(SIZES), size=count)]
    image = rng.random(count) < IMAGES
    fps = np.where(image, np.nan, np.array(RATES)[rng.integers(len(RATES), size=count)])
    frames = np.where(image, 1, np.nan_to_num(fps, nan=1.0) * rng.uniform(*SECONDS, size=count)).astype(np.int64)
    numbers = pa.array(np.arange(count)).cast(pa.string())
    columns = {
        "path": pc.binary_join_element_wise("synthetic", numbers, "/"),
        "text": pc.binary_join_element_wise("a synthetic clip, number", numbers, " "),
        "num_frames": frames,
        "height": size[:, 0],
        "width": size[:, 1],
        "aspect_ratio": size[:, 0] / size[:, 1],
        "resolution": size[:, 0] * size[:, 1],
        "fps": fps,
        "status": pa.repeat("ok", count),
    }
    empty = {field.name: _empty(field.type, count) for field in SCHEMA}
    return pa.table(empty | columns, schema=SCHEMA)


def _empty(kind: pa.DataType, count: int) -> pa.Array:
    return pa.repeat(pa.scalar("" if kind == pa.string() else 0).cast(kind), count)


def read_synthetic(
    clip: Clip, info: VideoInfo, picks: Int[np.ndarray, " T"], target: tuple[int, int]
) -> UInt8[np.ndarray, "T h w 3"]:
    """Returns frames whose brightness runs over the diagonal, at a speed of the clip's own."""
    del info
    number = crc32(str(clip).encode())
    ramp = (np.arange(target[0])[:, None] + np.arange(target[1]) + number % 251).astype(np.uint8)
    moved = picks[:, None] * (np.array([1, 2, 3]) + number % 7)
    return ramp[None, :, :, None] + moved.astype(np.uint8)[:, None, None, :]
