"""Pixels to channels and back, and the shortcuts around a change of resolution that follow from it.

The shortcuts have no parameters: what a resampling layer must learn is only the difference to them.
Source: DC-AE (Chen et al. 2024, arXiv:2410.10733), section 3.2; hpcaitech/Open-Sora, `opensora/models/dc_ae/`.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from einops import rearrange
from jax import Array
from jaxtyping import Float

from opensora_jax.nn.conv3d import Triple


def pixel_unshuffle(x: Float[Array, "B T H W C"], factors: Triple) -> Float[Array, "B t h w D"]:
    """Returns blocks of (frames, rows, columns) as channels: those of one input channel lie together."""
    a, b, c = factors
    return rearrange(x, "B (T a) (H b) (W c) C -> B T H W (C a b c)", a=a, b=b, c=c)


def pixel_shuffle(x: Float[Array, "B t h w D"], factors: Triple) -> Float[Array, "B T H W C"]:
    """Returns channels as blocks of (frames, rows, columns): the inverse of `pixel_unshuffle`."""
    a, b, c = factors
    return rearrange(x, "B T H W (C a b c) -> B (T a) (H b) (W c) C", a=a, b=b, c=c)


def grow_nearest(x: Float[Array, "B t h w C"], factors: Triple) -> Float[Array, "B T H W C"]:
    """Returns `x` with every position repeated."""
    for axis, factor in enumerate(factors, start=1):
        x = jnp.repeat(x, factor, axis=axis) if factor > 1 else x
    return x


def factors_of(x: Float[Array, "B T H W C"], factor: int, in_time: bool) -> Triple:
    """Returns (frames, rows, columns) to resample by: a single frame is an image and keeps its place in time."""
    return (factor if in_time and x.shape[1] > 1 else 1, factor, factor)


@dataclass(frozen=True)
class Averaging:
    """Shrinks: blocks of pixels become channels, of which each run of equal length is averaged to one of `features`."""

    features: int
    factor: int
    in_time: bool = False

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B t h w D"]:
        channels = pixel_unshuffle(x, factors_of(x, self.factor, self.in_time))
        return rearrange(channels, "B T H W (D run) -> B T H W D run", D=self.features).mean(-1)


@dataclass(frozen=True)
class Duplicating:
    """Grows: every channel is repeated in place until there are enough to become blocks of pixels."""

    features: int
    factor: int
    in_time: bool = False

    def __call__(self, x: Float[Array, "B t h w C"]) -> Float[Array, "B T H W D"]:
        a, b, c = factors = factors_of(x, self.factor, self.in_time)
        return pixel_shuffle(jnp.repeat(x, self.features * a * b * c // x.shape[-1], axis=-1), factors)
