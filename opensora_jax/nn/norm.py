"""Normalisation layers: statistics in float32, output in the input's dtype."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from jaxtyping import Float


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
        return (wide * inverse).astype(x.dtype) * self.scale[...].astype(x.dtype)


def standardize(x: Float[Array, "*B D"], eps: float = 1e-6) -> Float[Array, "*B D"]:
    """Returns `x` with zero mean and unit variance over the last axis (a LayerNorm without parameters)."""
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(-1, keepdims=True)
    return (wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + eps)).astype(x.dtype)


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
        wide = rearrange(x.astype(jnp.float32), "B ... (G C) -> B (...) G C", G=self.groups)
        mean = wide.mean((1, 3), keepdims=True)
        inverse = jax.lax.rsqrt(((wide - mean) ** 2).mean((1, 3), keepdims=True) + self.eps)
        y = ((wide - mean) * inverse).reshape(x.shape)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)
