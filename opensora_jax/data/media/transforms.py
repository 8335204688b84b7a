"""Geometry in space and time: which rectangle and which frames of a video become a training clip.

Sizes, crop offsets with their two roundings (image, video), frame numbers and `original_pixels` are those of
Open-Sora 2.0, opensora/datasets/{utils,video_transforms}.py. Usually `data.video` lets ffmpeg scale and cut to
this geometry, which is faster and antialiased; `original_pixels` is the same geometry in the original's own
arithmetic, for comparisons (docs/data.md has the difference in numbers).
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int, Real, UInt8
from PIL import Image


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
    intervals = np.ceil(np.where(thinned, fps, fps_max) / fps_max)
    return np.where(thinned, np.minimum(intervals, 2.0**62), 1).astype(np.int64)  # rows that are bad have any rate


def frame_start(total: int, count: int, interval: int, seed: int | np.integer) -> int:
    """Returns the first frame of a clip out of a video of `total`, drawn by a well-mixed 64-bit seed.

    The range of starts is the original's: 0 .. max(0, total - count * interval - 1).
    """
    if total < count:
        raise ValueError(f"{total} frames do not hold {count}")
    return int(seed) % (max(0, total - count * interval - 1) + 1)


def frame_picks(start: int, count: int, interval: int, total: int) -> Int[np.ndarray, " T"]:
    """Returns the numbers of the `count` frames of a clip from `start` on, out of `total`.

    They are spread from the first to the last of count * interval frames (fewer at the end of the video) and
    rounded down: from interval 2 on, the distance of two frames is now and then one more than `interval`.
    """
    end = min(start + count * interval, total)
    if end - start < count:
        raise ValueError(f"{total} frames do not hold {count} from frame {start} on")
    return np.linspace(start, end - 1, count, dtype=np.int64)  # in float64, as there: its rounding matters


def original_pixels(
    frames: UInt8[np.ndarray, "T H W 3"], target: tuple[int, int], *, image: bool
) -> Float32[np.ndarray, "T h w 3"]:
    """Returns the frames scaled to cover `target` (height, width) and cut in the middle, in [-1, 1].

    Source: `resize_crop` of get_transforms_image and get_transforms_video: images by Pillow's bicubic filter,
    which is antialiased and rounds to 8 bits; videos bilinear between the nearest two pixels, which is not.
    """
    height, width = frames.shape[1:3]
    scaled = resize_and_crop(height, width, target, image=image)
    return (_by_pillow if image else _bilinear)(frames, scaled)


def original_center_pixels(
    frames: UInt8[np.ndarray, "T H W 3"], side: int, *, image: bool
) -> Float32[np.ndarray, "T h w 3"]:
    """Returns the frames scaled until the shorter side is `side`, cut to a square in the middle, in [-1, 1].

    Source: `center` of get_transforms_image and get_transforms_video; images are halved as often as possible
    first. Here half a pixel of offset rounds down in images and to even in videos.
    """
    if image:
        frames = _halved(frames, side)
    height, width = frames.shape[1:3]
    scale = side / min(height, width)
    size = (round(height * scale), round(width * scale))
    spare = (size[0] - side, size[1] - side)
    top, left = (s // 2 if image else round(s / 2) for s in spare)
    return (_by_pillow if image else _bilinear)(frames, Geometry(size, (top, left, side, side)))


def _by_pillow(images: UInt8[np.ndarray, "T H W 3"], scaled: Geometry) -> Float32[np.ndarray, "T h w 3"]:
    (rows, columns), (top, left, tall, wide) = scaled
    resized = [Image.fromarray(one).resize((columns, rows), Image.Resampling.BICUBIC) for one in images]
    cut = np.stack([np.asarray(one)[top : top + tall, left : left + wide] for one in resized])
    return (cut.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)


def _halved(images: UInt8[np.ndarray, "T H W 3"], side: int) -> UInt8[np.ndarray, "T h w 3"]:
    while min(images.shape[1:3]) >= 2 * side:
        size = (images.shape[2] // 2, images.shape[1] // 2)
        images = np.stack([np.asarray(Image.fromarray(one).resize(size, Image.Resampling.BOX)) for one in images])
    return images


def _bilinear(frames: UInt8[np.ndarray, "T H W 3"], scaled: Geometry) -> Float32[np.ndarray, "T h w 3"]:
    """Computes what lies in the crop only, frame by frame: what is in work then stays in the processor's cache."""
    (rows, columns), (top, left, tall, wide) = scaled
    above, below, down = _neighbours(frames.shape[1], rows, slice(top, top + tall))
    before, behind, across = _neighbours(frames.shape[2], columns, slice(left, left + wide))
    pixels = np.empty((len(frames), tall, wide, 3), np.float32)
    for frame, out in zip(frames, pixels, strict=True):
        upper, lower = (
            _between(lines.take(before, 1), lines.take(behind, 1), across[:, None])
            for lines in (frame[above], frame[below])
        )
        out[:] = _between(upper, lower, down[:, None, None])
    pixels /= 127.5
    pixels -= 1
    return pixels


def _between(
    first: Real[np.ndarray, "h w 3"], second: Real[np.ndarray, "h w 3"], share: Float32[np.ndarray, "..."]
) -> Float32[np.ndarray, "h w 3"]:
    """Returns first + share * (second - first)."""
    first, second = first.astype(np.float32), second.astype(np.float32)
    second -= first
    second *= share
    second += first
    return second


def _neighbours(
    source: int, scaled: int, kept: slice
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"], Float32[np.ndarray, " N"]]:
    """Returns, for the kept ones of the scaled pixels, two source pixels and how far it is to the second.

    Centres of pixels lie at i + 0.5 (align_corners=False). The original computes places in float32, so far from
    the corner they are off by up to 1e-4 of a pixel, which float64 would not repeat.
    """
    ratio, half = np.float32(source) / np.float32(scaled), np.float32(0.5)
    place = np.maximum(ratio * (np.arange(scaled, dtype=np.float32)[kept] + half) - half, 0)
    first = np.minimum(place.astype(np.int64), source - 1)
    return first, np.minimum(first + 1, source - 1), place - first.astype(np.float32)
