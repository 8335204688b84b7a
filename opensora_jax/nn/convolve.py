"""Convolution of images, the one that all convolutions of videos are made of.

On a CPU a large one runs in parts. XLA hands it to Eigen, which unrolls the windows of all outputs at a time: beyond a
few million values, the product of outputs and window, it falls out of the caches and takes twice as long or more.
Backwards it stays whole, since XLA is slow at the gradients of a loop of convolutions. So it does where several devices
share the work: they exchange the seams of a convolution, and would gather all that a loop takes its parts from.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from opensora_jax.kernels.choice import is_split

LARGEST_PART = 600_000  # outputs times values under the kernel
LARGEST_PRODUCT = 4_000_000  # the same, as one product of matrices
DEEP = 64  # channels from which parts are faster
WIDE = 512  # channels from which a product of matrices is faster than Eigen's convolution

Strides = tuple[int, int]
Triple = tuple[int, int, int]
Run = Callable[[Array, Array], Array]  # of (x, kernel)


def convolve(x: Float[Array, "N H W C"], kernel: Float[Array, "h w C D"], strides: Strides) -> Float[Array, "N p q D"]:
    """Returns the convolution of every image without padding, accumulated and returned in float32."""
    outputs = x.shape[0] * math.prod(_outputs(x.shape, kernel.shape, strides))
    deep, wide = kernel.shape[2] >= DEEP, kernel.shape[2] >= WIDE
    large = wide or (deep and outputs * math.prod(kernel.shape[:3]) > LARGEST_PART)
    whole = partial(_whole, strides=strides)
    if not large or on_several_devices(x, kernel):
        return whole(x, kernel)
    return by_platform(partial(_in_parts, strides=strides), whole, cpu_backwards=whole)(x, kernel)


def convolve_videos(
    x: Float[Array, "B T H W C"], kernel: Float[Array, "t h w C D"], strides: Triple, zeros: tuple[tuple[int, int], ...]
) -> Float[Array, "B p q r D"]:
    """Returns XLA's own convolution of videos in float32, with so many zeros before and behind each axis.

    Its sums are rounded to the dtype of `x` on the way, which is the form that GPUs have kernels for.
    """
    numbers = ("NDHWC", "DHWIO", "NDHWC")
    return jax.lax.conv_general_dilated(x, kernel, strides, zeros, dimension_numbers=numbers).astype(jnp.float32)


def on_several_devices(*arrays: Array) -> bool:
    """Returns whether the compiler may split any of them over several devices: its type says so, also when traced."""
    return any(is_split(jax.typeof(array).sharding.mesh) for array in arrays)


def by_platform(cpu: Run, default: Run, *, cpu_backwards: Run) -> Run:
    """Returns a convolution computed in one way on CPUs and in another elsewhere.

    Gradients are those of `cpu_backwards` and `default`. Nothing but the operands is kept for them.
    """

    @jax.custom_vjp
    def run(x: Array, kernel: Array) -> Array:
        return jax.lax.platform_dependent(x, kernel, cpu=cpu, default=default)

    def forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
        return run(x, kernel), (x, kernel)

    def backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, ...]:
        def of(run: Run) -> Callable[..., tuple[Array, ...]]:
            return lambda gradient, *kept: jax.vjp(run, *kept)[1](gradient)

        return jax.lax.platform_dependent(gradient, *kept, cpu=of(cpu_backwards), default=of(default))

    run.defvjp(forward, backward)
    return run


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


def _product(x: Array, kernel: Array, strides: Strides) -> Array:
    """Returns `_whole` as a product of all windows, written out, with the kernel."""
    rows, columns = _outputs(x.shape, kernel.shape, strides)
    down, right = strides
    windows = jnp.concatenate(
        [
            x[:, i : i + (rows - 1) * down + 1 : down, j : j + (columns - 1) * right + 1 : right]
            for i in range(kernel.shape[0])
            for j in range(kernel.shape[1])
        ],
        axis=-1,
    )
    flat = kernel.reshape(-1, kernel.shape[-1])
    return jnp.einsum("n h w k, k d -> n h w d", windows, flat, preferred_element_type=jnp.float32)


def _in_parts(x: Array, kernel: Array, strides: Strides) -> Array:
    """Goes over strips of rows of one image at a time, or over several whole images where those are small."""
    images, window, down = len(x), kernel.shape[0], strides[0]
    rows, columns = _outputs(x.shape, kernel.shape, strides)
    cost = columns * math.prod(kernel.shape[:3])  # of one row of outputs
    run, largest = (_product, LARGEST_PRODUCT) if kernel.shape[2] >= WIDE else (_whole, LARGEST_PART)
    strips = -(-rows // max(1, largest // cost))
    if strips == 1:
        fitting = (n for n in range(1, images + 1) if images % n == 0 and n * rows * cost <= largest)
        several = max(fitting, default=1)  # a row alone may be too long
        parts = x.reshape(images // several, several, *x.shape[1:])
        return jax.lax.map(lambda part: run(part, kernel, strides), parts).reshape(images, rows, columns, -1)
    each = -(-rows // strips)
    tall = (each - 1) * down + window
    seen = x[:, : (rows - 1) * down + window]
    padded = jnp.pad(seen, ((0, 0), (0, (strips * each - rows) * down), (0, 0), (0, 0)))

    def strip_of(index: Array) -> Array:
        start = (index // strips, index % strips * each * down, 0, 0)
        return run(jax.lax.dynamic_slice(padded, start, (1, tall, *x.shape[2:])), kernel, strides)

    y = jax.lax.map(strip_of, jnp.arange(images * strips))
    return y.reshape(images, strips * each, columns, -1)[:, :rows]
