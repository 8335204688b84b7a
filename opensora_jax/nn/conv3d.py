"""Causal 3D convolution; on CPUs computed as one 2D convolution per tap of time, or by tiles (nn/winograd.py).

XLA's own 3D convolution is 2.4 times slower on CPUs. Elsewhere it is the better one: the parts of a sum over taps would
lie in memory one by one, in float32.
"""

from functools import partial, reduce

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from opensora_jax.nn import winograd
from opensora_jax.nn.convolve import Triple, by_platform, convolve, convolve_videos, on_several_devices
from opensora_jax.nn.linear import Init


def orthogonal_point(rng: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Returns kernels that mix channels at one point, the centre of the current frame, and keep their lengths.

    A deep network of such kernels passes all colours through; products of random ones pass little but brightness.
    Source: delta-orthogonal kernels, Xiao et al. 2018 (arXiv:1806.05393); kernels that start as an image network,
    MAGVIT-v2 (Yu et al. 2023, arXiv:2310.05737).
    """
    mix = nnx.initializers.orthogonal()(rng, shape[-2:], dtype) * max(1.0, shape[-1] / shape[-2]) ** 0.5
    centre = shape[1] // 2
    return jnp.zeros(shape, dtype).at[-1, centre, centre].set(mix)


def orthogonal_blur(rng: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Returns `orthogonal_point` spread by a (1, 2, 1) / 4 filter, for kernels that change the resolution."""
    weights = jnp.asarray([1.0, 2.0, 1.0], dtype) / 4
    point = orthogonal_point(rng, shape, dtype)[-1, 1, 1]
    return jnp.zeros(shape, dtype).at[-1].set(jnp.einsum("h,w,io->hwio", weights, weights, point))


def conv_frames(x: Float[Array, "B T H W C"], kernel: Float[Array, "h w C D"], strides: tuple[int, int]) -> Array:
    """Returns the 2D convolution of every frame without padding, accumulated in float32."""
    y = convolve(rearrange(x, "B T H W C -> (B T) H W C"), kernel, strides)
    return rearrange(y, "(B T) H W C -> B T H W C", B=x.shape[0])


class Conv3d(nnx.Module):
    """Returns the convolution of `x` without padding in space; the kernel is (time, height, width, in, out).

    In time every output sees the frame at its place and those before; the first frame stands for all before it.
    That is not padded but repeated after each tap, which saves work and, backwards, copies of the input.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int,
        *,
        strides: Triple = (1, 1, 1),
        kernel_init: Init = orthogonal_point,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.strides, self.dtype = strides, dtype
        shape = (kernel_size, kernel_size, kernel_size, in_features, out_features)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, jnp.float32), axes=(None, None, None, "embed", "mlp"))
        self.bias = nnx.Param(jnp.zeros((out_features,), jnp.float32), axes=("mlp",))

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B t h w D"]:
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        if x.shape[1] == 1:  # all taps see the one frame
            kernel = kernel.sum(0, keepdims=True)
        return (_convolve(x, kernel, self.strides) + self.bias[...]).astype(self.dtype)


def _convolve(x: Array, kernel: Array, strides: Triple) -> Array:
    by_taps = partial(_by_taps, strides=strides)
    if len(kernel) == 1:
        return by_taps(x, kernel)
    is_tiled = winograd.is_faster(x.shape, kernel.shape, strides) and not on_several_devices(x, kernel)
    run = by_platform(
        winograd.convolve_causal if is_tiled else by_taps, partial(_whole, strides=strides), cpu_backwards=by_taps
    )
    return run(x, kernel)


def _whole(x: Array, kernel: Array, strides: Triple) -> Array:
    """Returns XLA's own convolution, the first frame repeated for those before it."""
    padded = jnp.concatenate([jnp.repeat(x[:, :1], len(kernel) - 1, axis=1), x], axis=1)
    return convolve_videos(padded, kernel, strides, ((0, 0),) * 3)


def _by_taps(x: Array, kernel: Array, strides: Triple) -> Array:
    """Returns the sum of 2D convolutions, one for each tap of time: delayed by i, output t sees frame max(0, t - i)."""
    taps = (_tap(x, kernel[-1 - delay], delay, strides) for delay in reversed(range(len(kernel))))
    return reduce(jnp.add, taps)


def _tap(x: Array, kernel: Array, delay: int, strides: Triple) -> Array:
    step = strides[0]
    frames = (x.shape[1] - 1) // step + 1
    first = min(frames, delay // step + 1)  # so many outputs see frame 0
    seen = x[:, : (frames - first) * step + 1 : step]
    if delay % step:
        seen = jnp.concatenate([x[:, :1], x[:, first * step - delay : (frames - 1) * step - delay + 1 : step]], axis=1)
    y = conv_frames(seen, kernel, strides[1:])
    return jnp.concatenate([jnp.repeat(y[:, :1], first - 1, axis=1), y], axis=1) if first > 1 else y


class CausalConv3d(nnx.Module):
    """A convolution whose output at frame t sees frames up to t; borders repeat the nearest pixel or frame.

    Source: hpcaitech/Open-Sora, `opensora/models/hunyuan_vae/unet_causal_3d_blocks.py`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int = 3,
        *,
        strides: Triple = (1, 1, 1),
        kernel_init: Init = orthogonal_point,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.conv = Conv3d(
            in_features, out_features, kernel_size, strides=strides, kernel_init=kernel_init, dtype=dtype, rngs=rngs
        )
        border = (kernel_size // 2, kernel_size // 2)
        self.padding = ((0, 0), (0, 0), border, border, (0, 0))

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B t h w D"]:
        return self.conv(jnp.pad(x, self.padding, mode="edge"))
