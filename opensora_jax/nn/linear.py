"""Dense layer: float32 parameters, compute in the chosen dtype.

Logical axis names travel with each kernel as inert metadata; `parallel.rules` turns them into shardings. Where a
device holds a part of a parameter, `whole` gathers it.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from opensora_jax.kernels.choice import platform
from opensora_jax.nn.scaled import scaled
from opensora_jax.parallel.gather import is_split_along_tensor, whole

Init = Callable[[Array, tuple[int, ...], DTypeLike], Array]
fan_in = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # torch.nn.Linear's kernel distribution
zeros = nnx.initializers.zeros_init()
MANY_ROWS = 4096  # of a sample: with fewer, gradients of a kernel by sample take more memory than they save time


class Linear(nnx.Module):
    """Returns `x @ kernel + bias` in `dtype`, the last axis going from `in_features` to `out_features`."""

    is_kernel_all = True  # that is the whole of it, so that parts of the kernel give parts of the result

    def __init__(
        self,
        in_features: int,
        out_features: int,
        axes: tuple[str | None, str | None] = ("embed", "mlp"),
        *,
        bias: bool = True,
        kernel_init: Init = fan_in,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        self.kernel = nnx.Param(kernel_init(rngs.params(), (in_features, out_features), jnp.float32), axes=axes)
        self.bias = nnx.Param(jnp.zeros((out_features,), jnp.float32), axes=(axes[1],)) if bias else None

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B E"]:
        y = _product(x.astype(self.dtype), whole(self.kernel, self.dtype))
        return y if self.bias is None else y + whole(self.bias, self.dtype)

    def split(self, x: Float[Array, "*B D"], places: Sequence[int]) -> list[Float[Array, "*B _"]]:
        """Returns the result's columns up to each place and from there on.

        Where devices split columns along `tensor`, each part is a product of its own: cut out of the whole it would lie
        on other devices than its heads, and tokens would travel where now parts of the kernel do.
        """
        if not (self.is_kernel_all and is_split_along_tensor()):
            return jnp.split(self(x), places, axis=-1)
        kernels = jnp.split(whole(self.kernel, self.dtype), places, axis=1)
        parts = [_product(x.astype(self.dtype), kernel) for kernel in kernels]
        if self.bias is None:
            return parts
        biases = jnp.split(whole(self.bias, self.dtype), places)
        return [part + bias for part, bias in zip(parts, biases, strict=True)]

    def joined(self, parts: Sequence[Float[Array, "*B _"]]) -> Float[Array, "*B E"]:
        """Returns the result of parts that lie side by side on the last axis; along `tensor` see `split`."""
        if len(parts) == 1 or not (self.is_kernel_all and is_split_along_tensor()):
            return self(_side_by_side(parts))
        places = np.cumsum([part.shape[-1] for part in parts])[:-1].tolist()
        kernels = jnp.split(whole(self.kernel, self.dtype), places)
        products = [_product(x.astype(self.dtype), kernel) for x, kernel in zip(parts, kernels, strict=True)]
        y = sum(products[1:], products[0])
        return y if self.bias is None else y + whole(self.bias, self.dtype)

    def gated(self, parts: Sequence[Float[Array, "B L _"]], gate: Float[Array, "B 1 E"]) -> Float[Array, "B L E"]:
        """Returns `gate * self.joined(parts)`, with a gate for each sample.

        Of long samples the gate's gradient comes from the kernel's and not from the result: blocks that make their
        activations again leave this product out, and others need not keep its result.
        """
        if parts[0].shape[1] < MANY_ROWS or not self.is_kernel_all or is_split_along_tensor():
            return scaled(self.joined(parts), gate)
        x = _side_by_side(parts)
        bias = None if self.bias is None else whole(self.bias, self.dtype)
        return _gated(x.astype(self.dtype), whole(self.kernel, self.dtype), bias, gate)


def _side_by_side(parts: Sequence[Array]) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


@jax.custom_vjp
def _gated(x: Array, kernel: Array, bias: Array | None, gate: Array) -> Float[Array, "B L E"]:
    y = _product(x, kernel)
    return gate * (y if bias is None else y + bias)


def _gated_forward(x: Array, kernel: Array, bias: Array | None, gate: Array) -> tuple[Array, tuple]:
    return _gated(x, kernel, bias, gate), (x, kernel, bias, gate)


def _gated_backward(kept: tuple, gradient: Float[Array, "B L E"]) -> tuple:
    x, kernel, bias, gate = kept

    def of_sample(total: Array, sample: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        x, gradient, gate = sample
        met = jnp.einsum("LD,LE->ED", x, gradient, preferred_element_type=jnp.float32)
        return total + gate.T * met, (kernel.T * met).sum(1)[None]

    # One sample after the other: of a batch at once XLA's products take 3% longer. (E, D), because `fsdp` splits E:
    # TPUs scatter sums over rows, and would add up all of a sum that is split over columns.
    by_kernel, by_gate = jax.lax.scan(of_sample, jnp.zeros(kernel.T.shape, jnp.float32), (x, gradient, gate))
    by_kernel = by_kernel.T
    by_x = _product((gate * gradient).astype(x.dtype), kernel.T)
    if bias is None:
        return by_x, by_kernel.astype(kernel.dtype), None, by_gate.astype(gate.dtype)
    summed = gradient.sum(1, keepdims=True, dtype=jnp.float32)
    by_bias = (gate * summed).sum((0, 1))
    return (
        by_x,
        by_kernel.astype(kernel.dtype),
        by_bias.astype(bias.dtype),
        (by_gate + bias * summed).astype(gate.dtype),
    )


_gated.defvjp(_gated_forward, _gated_backward)


def _product(x: Float[Array, "*B D"], kernel: Float[Array, "D E"]) -> Float[Array, "*B E"]:
    """Returns `x @ kernel`. On CPUs all rows lie on one axis, or XLA would turn both sides of the kernel's gradient."""
    if platform() != "cpu":  # TPUs would move rows to join axes that are no multiple of their tiles
        return jnp.dot(x, kernel)
    return jnp.dot(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], -1)


class Embedding(nnx.Module):
    """Returns rows of a table for integer ids."""

    def __init__(self, vocabulary: int, features: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.dtype = dtype
        table = 0.02 * jax.random.normal(rngs.params(), (vocabulary, features), jnp.float32)
        self.table = nnx.Param(table, axes=("vocabulary", "embed"))

    def __call__(self, ids: Array) -> Array:
        return jnp.take(whole(self.table, self.dtype), ids, axis=0)
