"""Convolution with zeros beyond all borders that looks both ways in time; on CPUs one 2D convolution per tap of time.

XLA's own 3D convolution is 2.4 times slower on CPUs. Elsewhere it is the better one, as in nn/conv3d.py.
"""

from functools import partial, reduce

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from opensora_jax.nn.conv3d import conv_frames
from opensora_jax.nn.convolve import Triple, by_platform, convolve_videos
from opensora_jax.nn.linear import Init, fan_in


class Conv(nnx.Module):
    """Returns the convolution of `x`; sizes are odd, and strides leave every step-th position, the first included.

    A kernel of three sizes is (time, height, width, in, out); one of two has no time: each frame is an image. No zero
    frame is made: a tap adds nothing to outputs for which it lies outside the clip.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: tuple[int, ...],
        *,
        strides: Triple = (1, 1, 1),
        bias: bool = True,
        kernel_init: Init = fan_in,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.strides, self.dtype = strides, dtype
        shape, axes = (*kernel_size, in_features, out_features), (*[None] * len(kernel_size), "embed", "mlp")
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, jnp.float32), axes=axes)
        self.bias = nnx.Param(jnp.zeros((out_features,), jnp.float32), axes=("mlp",)) if bias else None

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B t h w D"]:
        kernel = self.kernel[...].astype(self.dtype)
        kernel = kernel[None] if kernel.ndim == 4 else kernel
        by_taps = partial(_by_taps, strides=self.strides)
        if len(kernel) == 1:
            total = by_taps(x.astype(self.dtype), kernel)
        else:
            zeros = tuple((size // 2, size // 2) for size in kernel.shape[:3])
            whole = partial(convolve_videos, strides=self.strides, zeros=zeros)
            total = by_platform(by_taps, whole, cpu_backwards=by_taps)(x.astype(self.dtype), kernel)
        return (total if self.bias is None else total + self.bias[...]).astype(self.dtype)


def _by_taps(x: Array, kernel: Array, strides: Triple) -> Array:
    """Returns the sum of 2D convolutions, one for each tap of time that any frame sees."""
    middle, *borders = [size // 2 for size in kernel.shape[:3]]
    padded = jnp.pad(x, ((0, 0), (0, 0), *[(size, size) for size in borders], (0, 0)))
    taps = [_tap(padded, kernel[tap], tap - middle, strides) for tap in range(len(kernel))]
    return reduce(jnp.add, [tap for tap in taps if tap is not None])


def _tap(x: Array, kernel: Array, shift: int, strides: Triple) -> Array | None:
    """Returns what one tap adds: output t sees frame t * step + shift, or nothing; None where no output sees one."""
    step, frames = strides[0], x.shape[1]
    count = (frames - 1) // step + 1
    first = max(0, -(shift // step))
    last = min(count - 1, (frames - 1 - shift) // step)
    if first > last:
        return None
    seen = x[:, first * step + shift : last * step + shift + 1 : step]
    y = conv_frames(seen, kernel, strides[1:])
    return jnp.pad(y, ((0, 0), (first, count - 1 - last), (0, 0), (0, 0), (0, 0)))
