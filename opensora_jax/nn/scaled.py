"""A product with a factor that many values share: gates, scales, the statistics of norms.

The factor's gradient is a sum of products. XLA's fused sum takes CPUs ten times as long as the same as a product of
matrices, and a block of the MMDiT has a dozen; other devices lose nothing by it.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from opensora_jax.kernels.choice import platform


def scaled(x: Float[Array, "*B"], by: Float[Array, "*#B"]) -> Float[Array, "*B"]:
    """Returns `x * by`; `by` has as many axes, of length 1 where its values hold for all of `x`."""
    return _scaled(x, by) if platform() == "cpu" else by * x  # in the other order TPUs take 0.5% longer


@jax.custom_vjp
def _scaled(x: Array, by: Array) -> Array:
    return x * by


def _scaled_forward(x: Array, by: Array) -> tuple[Array, tuple[Array, Array]]:
    return x * by, (x, by)


def _scaled_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, by = kept
    axes = range(x.ndim)
    own = [axis for axis in axes if by.shape[axis] == x.shape[axis]]
    summed = jnp.einsum(x, axes, gradient, axes, own, preferred_element_type=jnp.float32)
    return (gradient * by).astype(x.dtype), summed.reshape(by.shape).astype(by.dtype)


_scaled.defvjp(_scaled_forward, _scaled_backward)
