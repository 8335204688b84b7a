"""Convolution of images, the one that all convolutions of videos are made of.

On a CPU a large one runs in parts. XLA hands it to Eigen, which unrolls the windows of all outputs at a time: beyond a
few million values, the product of outputs and window, it falls out of the caches and takes twice as long or more.
Backwards it stays whole, since XLA is slow at the gradients of a loop of convolutions.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

LARGEST_PART = 2_000_000  # outputs times values under the kernel
DEEP = 64  # channels from which parts are faster

Strides = tuple[int, int]


def convolve(x: Float[Array, "N H W C"], kernel: Float[Array, "h w C D"], strides: Strides) -> Float[Array, "N p q D"]:
    """Returns the convolution of every image without padding, accumulated and returned in float32."""
    outputs = x.shape[0] * math.prod(_outputs(x.shape, kernel.shape, strides))
    large = kernel.shape[2] >= DEEP and outputs * math.prod(kernel.shape[:3]) > LARGEST_PART
    return _large(x, kernel, strides) if large else _whole(x, kernel, strides)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _large(x: Array, kernel: Array, strides: Strides) -> Array:
    return jax.lax.platform_dependent(
        x, kernel, cpu=partial(_in_parts, strides=strides), default=partial(_whole, strides=strides)
    )


def _outputs(x: tuple[int, ...], kernel: tuple[int, ...], strides: Strides) -> tuple[int, int]:
    """Returns rows and columns of the result for two shapes."""
    return (x[1] - kernel[0]) // strides[0] + 1, (x[2] - kernel[1]) // strides[1] + 1


def _whole(x: Array, kernel: Array, strides: Strides) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=jnp.float32,
    )


def _in_parts(x: Array, kernel: Array, strides: Strides) -> Array:
    """Goes over strips of rows of one image at a time, or over several whole images where those are small."""
    images, window, down = len(x), kernel.shape[0], strides[0]
    rows, columns = _outputs(x.shape, kernel.shape, strides)
    cost = columns * math.prod(kernel.shape[:3])  # of one row of outputs
    strips = -(-rows // max(1, LARGEST_PART // cost))
    if strips == 1:
        several = max(n for n in range(1, images + 1) if images % n == 0 and n * rows * cost <= LARGEST_PART)
        parts = x.reshape(images // several, several, *x.shape[1:])
        return jax.lax.map(lambda part: _whole(part, kernel, strides), parts).reshape(images, rows, columns, -1)
    each = -(-rows // strips)
    tall = (each - 1) * down + window
    seen = x[:, : (rows - 1) * down + window]
    x = jnp.pad(seen, ((0, 0), (0, (strips * each - rows) * down), (0, 0), (0, 0)))
    parts = jnp.stack([x[:, i * each * down : i * each * down + tall] for i in range(strips)], axis=1)
    y = jax.lax.map(lambda part: _whole(part, kernel, strides), parts.reshape(-1, 1, *parts.shape[2:]))
    return y.reshape(images, strips * each, columns, -1)[:, :rows]


def _forward(x: Array, kernel: Array, strides: Strides) -> tuple[Array, tuple[Array, Array]]:
    return _large(x, kernel, strides), (x, kernel)


def _backward(strides: Strides, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, ...]:
    return jax.vjp(partial(_whole, strides=strides), *kept)[1](gradient)


_large.defvjp(_forward, _backward)
