"""Normalisation layers: statistics in float32, output in the input's dtype."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from jaxtyping import Float

from opensora_jax.nn.scaled import scaled


class RMSNorm(nnx.Module):
    """Root-mean-square norm of the last axis; the normalised value is rounded to the input dtype before the gain.

    Source: the order of rounding follows the `llama` mode of the Liger kernel used by Open-Sora 2.0.
    """

    def __init__(self, features: int, *, eps: float = 1e-6, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32), axes=(None,))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return scaled(wide, inverse).astype(x.dtype) * self.scale[...].astype(x.dtype)


def standardize(x: Float[Array, "*B D"], eps: float = 1e-6) -> Float[Array, "*B D"]:
    """Returns `x` with zero mean and unit variance over the last axis (a LayerNorm without parameters)."""
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + eps)
    return scaled(wide, inverse).astype(x.dtype)


class LayerNorm(nnx.Module):
    """LayerNorm with gain and bias."""

    def __init__(self, features: int, *, eps: float = 1e-5, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32), axes=(None,))
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32), axes=(None,))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        wide = standardize(x.astype(jnp.float32), self.eps)
        return (wide * self.scale[...] + self.bias[...]).astype(x.dtype)


class GroupNorm(nnx.Module):
    """GroupNorm over all axes between batch and channels, so over time as well as space."""

    def __init__(self, groups: int, features: int, *, eps: float = 1e-6, rngs: nnx.Rngs):
        if features % groups:
            raise ValueError(f"GroupNorm needs channels divisible by groups: got {features} and {groups}.")
        self.groups, self.eps = groups, eps
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32), axes=(None,))
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32), axes=(None,))

    def __call__(self, x: Float[Array, "B *L C"]) -> Float[Array, "B *L C"]:
        wide = x.astype(jnp.float32)
        centred = wide - self._mean(wide)
        y = centred * jax.lax.rsqrt(self._mean(centred * centred) + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)

    def _mean(self, x: Float[Array, "B *L C"]) -> Array:
        """Returns the mean of each group, once per channel: channels first, so that no axis in space is reshaped.

        Split over devices in space, only these few numbers then travel.
        """
        by_channel = x.mean(range(1, x.ndim - 1), keepdims=True)
        by_group = rearrange(by_channel, "... (G C) -> ... G C", G=self.groups).mean(-1)
        return jnp.repeat(by_group, x.shape[-1] // self.groups, axis=-1)


class BatchNorm(nnx.Module):
    """BatchNorm over all axes but channels, with running statistics (`nnx.BatchStat`).

    Calling it uses the running statistics; `of_batch` uses those of the batch, and returns the running ones moved
    towards them by `momentum`: the module does not change. The running variance is the unbiased one.
    """

    def __init__(self, features: int, *, eps: float = 1e-5, momentum: float = 0.1, rngs: nnx.Rngs):
        self.eps, self.momentum = eps, momentum
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32), axes=(None,))
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32), axes=(None,))
        self.running_mean = nnx.BatchStat(jnp.zeros((features,), jnp.float32), axes=(None,))
        self.running_var = nnx.BatchStat(jnp.ones((features,), jnp.float32), axes=(None,))

    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        return self._normalised(x, self.running_mean[...], self.running_var[...])

    def of_batch(self, x: Float[Array, "*B C"]) -> tuple[Float[Array, "*B C"], dict[str, Float[Array, "C"]]]:
        """Returns `x` normalised by its own mean and variance, and the values of the running statistics after it.

        Raises: ValueError for a single position, which has no variance.
        """
        wide, positions = x.astype(jnp.float32).reshape(-1, x.shape[-1]), x.size // x.shape[-1]
        if positions < 2:
            raise ValueError("BatchNorm needs two positions or more in a batch to train: got one; use larger clips.")
        mean = wide.mean(0)
        variance = ((wide - mean) ** 2).mean(0)
        found = {"running_mean": mean, "running_var": variance * positions / (positions - 1)}
        kept = {name: (1 - self.momentum) * getattr(self, name)[...] for name in found}
        after = {name: kept[name] + self.momentum * value for name, value in jax.lax.stop_gradient(found).items()}
        return self._normalised(x, mean, variance), after

    def _normalised(self, x: Array, mean: Array, variance: Array) -> Array:
        factor = jax.lax.rsqrt(variance + self.eps) * self.scale[...]
        return ((x.astype(jnp.float32) - mean) * factor + self.bias[...]).astype(x.dtype)
