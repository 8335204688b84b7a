"""Convolutions within groups of channels: one filter per channel, and mixing of a few channels at one point.

A kernel of three sizes is (time, height, width, in, out) and looks both ways in time; one of two sees each frame on
its own. XLA's own depthwise 3D convolution is 70 times slower on CPUs.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from opensora_jax.nn.linear import fan_in


class DepthwiseConv(nnx.Module):
    """Returns `x` with every channel filtered by its own kernel, of odd sizes, with zeros beyond all borders.

    The filter is a sum of shifted products, and the taps of time are a loop: one expression with all 125 products of a
    5x5x5 kernel is 14 times slower on CPUs.
    """

    def __init__(
        self, features: int, kernel_size: tuple[int, ...], *, bias: bool = True, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.dtype = dtype
        axes = (*[None] * (len(kernel_size) + 1), "mlp")
        self.kernel = nnx.Param(fan_in(rngs.params(), (*kernel_size, 1, features), jnp.float32), axes=axes)
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32), axes=("mlp",)) if bias else None

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T H W C"]:
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)[..., 0, :]
        kernel = kernel[None] if kernel.ndim == 3 else kernel
        taps, rows, columns, _ = kernel.shape
        _, T, H, W, _ = x.shape
        borders = [(size // 2, size // 2) for size in (taps, rows, columns)]
        padded = jnp.pad(x, ((0, 0), *borders, (0, 0))).astype(jnp.float32)

        def add_tap(total: Array, tap: tuple[Array, Array]) -> tuple[Array, None]:
            start, weights = tap
            frames = jax.lax.dynamic_slice_in_dim(padded, start, T, axis=1)
            shifts = [(i, j) for i in range(rows) for j in range(columns)]
            return total + sum(frames[:, :, i : i + H, j : j + W] * weights[i, j] for i, j in shifts), None

        seen = slice(max(0, taps // 2 - T + 1), taps // 2 + T)  # the taps that see any frame
        starts, kernel = jnp.arange(taps)[seen], kernel[seen]
        total, _ = jax.lax.scan(add_tap, jnp.zeros(x.shape, jnp.float32), (starts, kernel))
        return (total if self.bias is None else total + self.bias[...]).astype(self.dtype)


class GroupedPointConv(nnx.Module):
    """Returns `x` with each of `groups` equal runs of channels mixed within itself, position by position.

    `rank` is how many axes of length 1 the kernel has: 3 for (time, height, width), 2 without time.
    """

    def __init__(self, features: int, groups: int, rank: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.groups, self.dtype = groups, dtype
        shape = (*[1] * rank, features // groups, features)
        self.kernel = nnx.Param(fan_in(rngs.params(), shape, jnp.float32), axes=(*[None] * (rank + 1), "mlp"))

    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        kernel = self.kernel[...].astype(self.dtype).reshape(self.kernel.shape[-2:])
        kernel = rearrange(kernel, "I (G O) -> G I O", G=self.groups)
        runs = rearrange(x.astype(self.dtype), "... (G I) -> ... G I", G=self.groups)
        return jnp.einsum("...gi,gio->...go", runs, kernel).reshape(x.shape)
