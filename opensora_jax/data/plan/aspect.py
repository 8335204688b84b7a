"""Which frame sizes belong to a resolution name such as "256px", "360p", "768px_max" or "48px_ar1:1".

A resolution is a number of pixels; every aspect ratio gets the size closest to it whose sides are multiples
of the spatial unit (autoencoder stride times patch). Rules and rounding are those of Open-Sora 2.0,
opensora/datasets/aspect.py.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Shaped

from opensora_jax.config.errors import UserError

# width:height, in the order that decides ties and which of two equal sizes keeps its name
RATIOS = ("2.39:1", "2:1", "16:9", "1.85:1", "9:16", "5:8", "3:2", "4:3", "1:1")

Sizes = dict[str, tuple[int, int]]


def nominal_ratio(name: str) -> float:
    """Returns height / width of a ratio written "width:height"."""
    width, height = map(float, name.split(":"))
    return height / width


def num_pixels(resolution: str) -> int:
    """Returns the nominal pixels of a frame: N*N for "Npx", 16/9 * N*N for "Np", whatever follows "_"."""
    name = resolution.split("_")[0]
    for suffix in ("px", "p"):
        digits = name.removesuffix(suffix)
        if digits != name and digits.isdecimal() and int(digits) > 0:
            side = int(digits)
            return side * side if suffix == "px" else int(side * side / 9 * 16)
    raise UserError(f'resolution "{resolution}" is not a size; write it as "256px" or "360p"')


def ratio_sizes(pixels: int, *, spatial_unit: int, training: bool = True, distinct: bool = True) -> Sizes:
    """Returns ratio name -> (height, width) in pixels; the order of the names decides ties.

    In training a size may move by one unit towards the nominal pixels, and of equal sizes only the first name
    stays (256px so loses 1.85:1, 5:8 and 8:5); sampling keeps every name. `distinct=False` keeps them in
    training too.
    """
    if spatial_unit**2 > pixels:
        raise UserError(
            f"a frame of {pixels} pixels has no room for a spatial unit of {spatial_unit}; use a larger one"
        )
    wide: Sizes = {}
    tall: Sizes = {}
    for name in RATIOS:
        height, width = _floor_size(pixels, name, spatial_unit)
        if training:
            height, width = _nudge(height, width, pixels, spatial_unit)
        if min(height, width) > 0 and not (training and distinct and (height, width) in wide.values()):
            wide[name] = (height, width)
            tall[":".join(reversed(name.split(":")))] = (width, height)
    return wide | tall


def _floor_size(pixels: int, name: str, unit: int) -> tuple[int, int]:
    width_ratio, height_ratio = map(float, name.split(":"))
    width = max(int(math.sqrt(pixels * (width_ratio / height_ratio)) // unit) * unit, unit)
    return int((pixels / width) // unit) * unit, width


def _nudge(height: int, width: int, pixels: int, unit: int) -> tuple[int, int]:
    candidates = [(height, width), (height - unit, width), (height + unit, width)]
    candidates += [(height, width - unit), (height, width + unit)]
    return min(candidates, key=lambda size: abs(size[0] * size[1] - pixels))  # the first of equals


def resolution_sizes(resolution: str, *, spatial_unit: int) -> tuple[int, Sizes]:
    """Returns the nominal pixels and the training sizes that a bucket of this resolution name uses.

    "_max" keeps the ratio with the most pixels, "_arW:H" that one ratio. Unlike the original, "_arW:H" also
    accepts a ratio whose size another ratio shares (48px_ar1:1 at unit 8 or 16): with one ratio there is
    nothing to merge.
    """
    pixels = num_pixels(resolution)
    sizes = ratio_sizes(pixels, spatial_unit=spatial_unit)
    _, _, setting = resolution.partition("_")
    if not setting:
        return pixels, sizes
    if setting == "max":
        largest = max(sizes, key=lambda name: math.prod(sizes[name]))
        return pixels, {largest: sizes[largest]}
    every = ratio_sizes(pixels, spatial_unit=spatial_unit, distinct=False)
    name = setting.removeprefix("ar")
    if name == setting or name not in every:
        raise UserError(f'resolution "{resolution}": after "_" stands "max" or "ar" and one of {", ".join(every)}')
    return pixels, {name: sizes.get(name, every[name])}


def image_size(
    resolution: str, ratio: str, *, spatial_unit: int, training: bool = False, distinct: bool = True
) -> tuple[int, int]:
    """Returns (height, width) of a resolution at an aspect ratio; sampling by default. Raises UserError."""
    sizes = ratio_sizes(num_pixels(resolution), spatial_unit=spatial_unit, training=training, distinct=distinct)
    if ratio not in sizes:
        raise UserError(f'{resolution} has no aspect ratio "{ratio}"; use one of {", ".join(sizes)}')
    return sizes[ratio]


def closest_ratios(
    height: Shaped[np.ndarray, " N"], width: Shaped[np.ndarray, " N"], names: Sequence[str]
) -> Int[np.ndarray, " N"]:
    """Returns for every frame the index into `names` of the nearest nominal ratio, the first of equals."""
    ratio = height / width
    index = np.zeros(ratio.shape, np.int64)
    best, distance = np.full(ratio.shape, np.inf), np.empty(ratio.shape)
    for i, name in enumerate(names):  # one pass per ratio keeps memory at a few arrays of N
        np.abs(np.subtract(ratio, nominal_ratio(name), out=distance), out=distance)
        np.copyto(index, i, where=distance < best)
        np.minimum(best, distance, out=best)
    return index
