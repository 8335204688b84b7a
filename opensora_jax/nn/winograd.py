"""Causal 3x3x3 convolution by Winograd's minimal filtering in space, for CPUs.

A tile of 2x2 outputs takes 16 products per pair of channels instead of 36. Tiles are transformed once for all three
taps of time, whose sum is part of the same product of matrices; a strip of rows at a time, so that it stays in the
caches. Source: F(2x2, 3x3) of Lavin and Gray 2015 (arXiv:1509.09308).
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

CHANNELS = 64  # of input and of output, from which it is faster than the direct convolution
POSITIONS = 4096  # outputs for each channel, from which it makes up for the transform of the kernel
LARGEST_STRIP = 2**17  # tiles times channels that are transformed at a time


def is_faster(x: tuple[int, ...], kernel: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Returns whether to use it, given the shapes B T H W C and (time, height, width, C, D) and the strides."""
    B, T, H, W, _ = x
    fits = kernel[:3] == (3, 3, 3) and strides == (1, 1, 1)
    return fits and min(kernel[3:]) >= CHANNELS and B * T * (H - 2) * (W - 2) >= POSITIONS


def convolve_causal(x: Float[Array, "B T H W C"], kernel: Float[Array, "3 3 3 C D"]) -> Float[Array, "B T h w D"]:
    """Returns the convolution without padding in space, in float32; in time the first frame stands for all before."""
    B, T, H, W, C = x.shape
    h, w = H - 2, W - 2
    each = min(-(-h // 2), max(1, LARGEST_STRIP // (C * -(-w // 2))))  # rows of tiles in a strip
    strips = -(-h // (2 * each))
    x = jnp.pad(x, ((0, 0), (0, 0), (0, strips * 2 * each - h), (0, w % 2), (0, 0)))
    kernels = _kernels_by_turn(kernel.astype(jnp.float32))

    def strip_of(index: Array) -> Array:
        start = (index // strips, 0, index % strips * 2 * each, 0, 0)
        part = jax.lax.dynamic_slice(x, start, (1, T, 2 * each + 2, *x.shape[3:]))
        return _convolve_strip(part[0].astype(jnp.float32), kernels)

    y = jax.lax.map(strip_of, jnp.arange(B * strips))
    y = y.reshape(B, strips, T, 2 * each, *y.shape[3:]).swapaxes(1, 2)
    return y.reshape(B, T, strips * 2 * each, *y.shape[4:])[:, :, :h, :w]


def _convolve_strip(x: Float[Array, "T H W C"], kernels: Float[Array, "3 16 K D"]) -> Float[Array, "T h w D"]:
    """Goes over the frames; the tiles of the last three lie side by side, each new frame's over the oldest's."""
    _, H, W, C = x.shape

    def step(seen: Array, frame: tuple[Array, Array]) -> tuple[Array, Array]:
        turn, pixels = frame
        seen = jax.lax.dynamic_update_slice(seen, _tiles(pixels), (0, 0, turn * C))
        kernel = jax.lax.dynamic_index_in_dim(kernels, turn, keepdims=False)
        return seen, _untile(jnp.einsum("x n k, x k d -> x n d", seen, kernel), H - 2, W - 2)

    before = jnp.tile(_tiles(x[0]), (1, 1, 3))
    return jax.lax.scan(step, before, (jnp.arange(len(x)) % 3, x))[1]


def _kernels_by_turn(kernel: Float[Array, "3 3 3 C D"]) -> Float[Array, "3 16 K D"]:
    """Returns the transformed kernel with its taps in the order in which frames lie after each of three turns."""

    def transform(g: list[Array]) -> list[Array]:
        ends, middle = (g[0] + g[2]) / 2, g[1] / 2
        return [g[0], ends + middle, ends - middle, g[2]]

    rows = transform([kernel[:, i] for i in range(3)])
    taps = jnp.stack([part for row in rows for part in transform([row[:, j] for j in range(3)])])  # 16 3 C D
    turns = [jnp.roll(taps, turn + 1, axis=1) for turn in range(3)]  # the newest frame's tap is the last
    return jnp.stack(turns).reshape(3, 16, -1, kernel.shape[-1])


def _tiles(x: Float[Array, "H W C"]) -> Float[Array, "16 N C"]:
    """Returns the transformed tiles of 4x4 pixels, two pixels apart."""
    rows = _transform(x, 0)
    return _transform(rows, 2).reshape(16, -1, x.shape[-1])


def _transform(x: Array, axis: int) -> Array:
    """Returns the four values of each tile along an axis, on a new axis in its place.

    The barriers keep XLA from computing them one element at a time inside the concatenation.
    """
    a, b, c, d = (jax.lax.slice_in_dim(x, i, x.shape[axis] - 3 + i, 2, axis) for i in range(4))
    return jax.lax.optimization_barrier(
        jnp.stack(jax.lax.optimization_barrier([a - c, b + c, c - b, b - d]), axis // 2)
    )


def _untile(products: Float[Array, "16 N D"], height: int, width: int) -> Float[Array, "H W D"]:
    """Returns the frame of the 2x2 outputs of every tile."""

    def outputs(m: Array) -> tuple[Array, Array]:
        return m[0] + m[1] + m[2], m[1] - m[2] - m[3]

    tiles = products.reshape(4, 4, height // 2, width // 2, -1)
    rows = [jnp.stack(outputs(row), axis=2) for row in outputs(tiles)]
    return jnp.stack(rows, axis=1).reshape(height, width, -1)
