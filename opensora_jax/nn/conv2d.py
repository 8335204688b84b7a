"""Convolution of images with zeros around them: the layer of autoencoders that see every frame as an image."""

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from opensora_jax.nn.conv3d import orthogonal_blur, orthogonal_point
from opensora_jax.nn.convolve import convolve
from opensora_jax.nn.linear import Init


def image_point(rng: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Returns `orthogonal_point` for kernels without a time axis."""
    return orthogonal_point(rng, (1, *shape), dtype)[0]


def image_blur(rng: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Returns `orthogonal_blur` for kernels without a time axis."""
    return orthogonal_blur(rng, (1, *shape), dtype)[0]


class Conv2d(nnx.Module):
    """Returns the convolution of images; the kernel is (height, width, in, out).

    A stride of 1 keeps the size. A stride of 2 halves an even size: its zeros are below and to the right alone.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        kernel_init: Init = image_point,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.stride, self.dtype = stride, dtype
        zeros = kernel_size - stride
        self.border = (zeros // 2, zeros - zeros // 2)
        shape = (kernel_size, kernel_size, in_features, out_features)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, jnp.float32), axes=(None, None, "embed", "mlp"))
        self.bias = nnx.Param(jnp.zeros((out_features,), jnp.float32), axes=("mlp",))

    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N h w D"]:
        padded = jnp.pad(x.astype(self.dtype), ((0, 0), self.border, self.border, (0, 0)))
        y = convolve(padded, self.kernel[...].astype(self.dtype), (self.stride, self.stride))
        return (y + self.bias[...]).astype(self.dtype)
