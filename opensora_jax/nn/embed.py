"""Embeddings of scalars and patches: sinusoids of time, the two-layer embedder, latents as tokens and back."""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from opensora_jax.nn.linear import Linear


def timestep_embedding(t: Float[Array, "B"], size: int, period: float = 10_000.0) -> Float[Array, "B D"]:
    """Returns `[cos, sin]` of 1000 t at `size / 2` frequencies, in the dtype of `t`.

    The factor 1000 is applied in that dtype before going to float32: published weights were trained so, and in
    bfloat16 this one rounding moves the model's output by 5%.
    """
    half = size // 2
    frequencies = np.exp(-np.log(period) * np.arange(half, dtype=np.float32) / half).astype(np.float32)
    angles = (1000.0 * t).astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1).astype(t.dtype)


class MLPEmbedder(nnx.Module):
    """Linear, SiLU, linear: lifts a small vector to the model width."""

    def __init__(self, in_features: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.in_layer = Linear(in_features, width, (None, "embed"), dtype=dtype, rngs=rngs)
        self.out_layer = Linear(width, width, ("embed", "mlp"), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B E"]:
        return self.out_layer(jax.nn.silu(self.in_layer(x)))


def patchify(x: Float[Array, "B T H W C"], patch: int) -> Float[Array, "B L D"]:
    """Returns tokens in (t h w) order with channels in (c ph pw) order, D = C * patch^2."""
    return rearrange(x, "B T (h p) (w q) C -> B (T h w) (C p q)", p=patch, q=patch)


def unpatchify(tokens: Float[Array, "B L D"], grid: tuple[int, int, int], patch: int) -> Float[Array, "B T H W C"]:
    """Returns the latent whose tokens these are; `grid` counts tokens along time, height and width."""
    T, h, w = grid
    return rearrange(tokens, "B (T h w) (C p q) -> B T (h p) (w q) C", T=T, h=h, w=w, p=patch, q=patch)


def grid_ids(grid: tuple[int, int, int]) -> Int[np.ndarray, "L 3"]:
    """Returns the (t, h, w) position of every token of a grid, in token order."""
    return np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), axis=-1).reshape(-1, 3)
