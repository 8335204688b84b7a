"""Geometry in space and time: which rectangle and which frames of a video become a training clip.

Only arithmetic: `data.video` lets ffmpeg scale and cut. Sizes, crop offsets and their two roundings (image,
video) are those of Open-Sora 2.0, opensora/datasets/{utils,video_transforms}.py. Frames lie exactly
`interval` apart, where the original stretches them to `interval * count - 1` by a truncated linspace, which
skips a frame now and then.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Geometry(NamedTuple):
    """Scale a frame to `size` (height, width), then cut `crop` (top, left, height, width); all in pixels."""

    size: tuple[int, int]
    crop: tuple[int, int, int, int]


def resize_and_crop(height: int, width: int, target: tuple[int, int], *, image: bool = False) -> Geometry:
    """Returns the scaling that just covers the target (height, width) and the central crop.

    A half pixel of offset rounds down in videos and to even in images.
    """
    tall, wide = target
    by_height, by_width = tall / height, wide / width
    by_rows, by_columns = (tall, round(width * by_height)), (round(height * by_width), wide)
    size = by_rows if by_height > by_width else by_columns
    spare_h, spare_w = size[0] - tall, size[1] - wide
    top, left = (round(spare_h / 2), round(spare_w / 2)) if image else (spare_h // 2, spare_w // 2)
    return Geometry(size, (top, left, tall, wide))


def target_fps(fps: float | int, fps_max: float | int) -> tuple[float | int, int]:
    """Returns (fps after thinning, every how many frames one is taken); (0, 1) for a rate of NaN (an image).

    A rate strictly below fps_max stays as it is; any other is divided by the least whole number and rounded
    down.
    """
    if not math.isfinite(fps):
        return 0, 1
    if fps < fps_max:
        return fps, 1
    interval = math.ceil(fps / fps_max)
    return math.floor(fps / interval), interval


def frame_intervals(fps: Float[np.ndarray, " N"], fps_max: float | int) -> Int[np.ndarray, " N"]:
    """Returns the second value of `target_fps` for a whole column."""
    thinned = np.isfinite(fps) & (fps >= fps_max)
    return np.where(thinned, np.ceil(np.where(thinned, fps, fps_max) / fps_max), 1).astype(np.int64)


def frame_start(total: int, count: int, interval: int, seed: int | np.integer) -> int:
    """Returns the first of `count` frames `interval` apart out of `total`, drawn by a well-mixed 64-bit seed.

    The range of starts is the original's: 0 .. max(0, total - count * interval - 1).
    """
    if total < (count - 1) * interval + 1:
        raise ValueError(f"{total} frames do not hold {count} frames {interval} apart")
    return int(seed) % (max(0, total - count * interval - 1) + 1)
