"""Blocks of EfficientViT for videos and images: linear attention over all positions, gated convolutions, residuals.

`rank` is 3 where convolutions see time and 2 where each frame is an image; attribute names are the published ones.
Source: EfficientViT (Cai et al. 2022, arXiv:2205.14756); hpcaitech/Open-Sora, `opensora/models/dc_ae/models/nn/`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from opensora_jax.nn.conv import Conv
from opensora_jax.nn.grouped_conv import DepthwiseConv, GroupedPointConv
from opensora_jax.nn.norm import LayerNorm, RMSNorm

HEAD_SIZE = 32
EXPANSION = 4  # width of the gated convolution over that of the block

Layer = Callable[[Array], Array]
ACTIVATIONS: dict[str, Layer] = {"relu": jax.nn.relu, "silu": jax.nn.silu}


def make_norm(name: str | None, features: int, rngs: nnx.Rngs) -> nnx.Module | None:
    """Returns a norm over channels by its published name (that of the tensor's rank is as good), None for None."""
    if name is None:
        return None
    return (LayerNorm if name == "ln2d" else BiasedRMSNorm)(features, eps=1e-5, rngs=rngs)


class BiasedRMSNorm(RMSNorm):
    """Root-mean-square norm of the last axis with gain and bias."""

    def __init__(self, features: int, *, eps: float = 1e-5, rngs: nnx.Rngs):
        super().__init__(features, eps=eps, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32), axes=(None,))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return super().__call__(x) + self.bias[...].astype(x.dtype)


class ConvLayer(nnx.Module):
    """A convolution, then a norm and an activation where there are any."""

    def __init__(self, conv: nnx.Module, norm: nnx.Module | None = None, act: Layer | None = None):
        self.conv, self.norm, self.act = conv, norm, act

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B t h w D"]:
        x = self.conv(x)
        x = x if self.norm is None else self.norm(x)
        return x if self.act is None else self.act(x)


class Residual(nnx.Module):
    """Returns `main(x) + shortcut(x)`; the shortcut has no parameters, and without one it is `x`."""

    def __init__(self, main: nnx.Module, shortcut: Layer | None = None):
        self.main, self.shortcut = main, shortcut

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B t h w D"]:
        return self.main(x) + (x if self.shortcut is None else self.shortcut(x))


class ResBlock(nnx.Module):
    """Two convolutions with an activation between them and a norm at the end."""

    def __init__(self, width: int, rank: int, norm: str | None, act: str, *, dtype: DTypeLike, rngs: nnx.Rngs):
        kernel = (3,) * rank
        self.conv1 = ConvLayer(Conv(width, width, kernel, dtype=dtype, rngs=rngs), act=ACTIVATIONS[act])
        conv = Conv(width, width, kernel, bias=False, dtype=dtype, rngs=rngs)
        self.conv2 = ConvLayer(conv, make_norm(norm, width, rngs))

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T H W C"]:
        return self.conv2(self.conv1(x))


def linear_attention(
    q: Float[Array, "B T H W N K"], k: Float[Array, "B T H W N K"], v: Float[Array, "B T H W N V"], eps: float = 1e-15
) -> Float[Array, "B T H W N V"]:
    """Returns attention of all positions with weights `relu(q) . relu(k)` over their sum, in float32.

    Its cost is linear in positions. They keep their axes, so that devices that share the rows need only add up sums.
    """
    q, k, v = (a.astype(jnp.float32) for a in (jax.nn.relu(q), jax.nn.relu(k), v))
    memory = jnp.einsum("bthwnk,bthwnv->bnkv", k, v)
    values = jnp.einsum("bthwnk,bnkv->bthwnv", q, memory)
    weights = jnp.einsum("bthwnk,bnk->bthwn", q, k.sum((1, 2, 3)))
    return values / (weights[..., None] + eps)


class LiteMLA(nnx.Module):
    """Linear attention whose queries, keys and values are seen at each of some scales besides the pointwise one."""

    def __init__(
        self,
        width: int,
        rank: int,
        norm: str | None,
        scales: tuple[int, ...],
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        heads = width // HEAD_SIZE
        inner, point = heads * HEAD_SIZE, (1,) * rank
        self.qkv = ConvLayer(Conv(width, 3 * inner, point, bias=False, dtype=dtype, rngs=rngs))
        self.aggreg = nnx.List(
            [
                nnx.List(
                    [
                        DepthwiseConv(3 * inner, (scale,) * rank, bias=False, dtype=dtype, rngs=rngs),
                        GroupedPointConv(3 * inner, 3 * heads, rank, dtype=dtype, rngs=rngs),
                    ]
                )
                for scale in scales
            ]
        )
        conv = Conv((1 + len(scales)) * inner, width, point, bias=False, dtype=dtype, rngs=rngs)
        self.proj = ConvLayer(conv, make_norm(norm, width, rngs))

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T H W C"]:
        qkv = self.qkv(x)
        scales = [qkv, *(mix(filtered(qkv)) for filtered, mix in self.aggreg)]
        parts = rearrange(jnp.concatenate(scales, -1), "... (N three K) -> three ... N K", three=3, K=HEAD_SIZE)
        y = linear_attention(*parts).astype(qkv.dtype)
        return self.proj(rearrange(y, "... N K -> ... (N K)"))


class GLUMBConv(nnx.Module):
    """Widen, filter each channel, gate one half by the other, narrow."""

    def __init__(
        self,
        width: int,
        rank: int,
        norm: str | None,
        act: str,
        expansion: int = EXPANSION,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        inner, point, self.gate_act = expansion * width, (1,) * rank, ACTIVATIONS[act]
        wide = Conv(width, 2 * inner, point, dtype=dtype, rngs=rngs)
        self.inverted_conv = ConvLayer(wide, act=ACTIVATIONS[act])
        self.depth_conv = ConvLayer(DepthwiseConv(2 * inner, (3,) * rank, dtype=dtype, rngs=rngs))
        narrow = Conv(inner, width, point, bias=False, dtype=dtype, rngs=rngs)
        self.point_conv = ConvLayer(narrow, make_norm(norm, width, rngs))

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T H W C"]:
        values, gate = jnp.split(self.depth_conv(self.inverted_conv(x)), 2, axis=-1)
        return self.point_conv(values * self.gate_act(gate))


class EfficientViTBlock(nnx.Module):
    """Linear attention for context, then gated convolutions for detail, each with a residual."""

    def __init__(
        self,
        width: int,
        rank: int,
        norm: str | None,
        act: str,
        scales: tuple[int, ...],
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.context_module = Residual(LiteMLA(width, rank, norm, scales, dtype=dtype, rngs=rngs))
        self.local_module = Residual(GLUMBConv(width, rank, norm, act, dtype=dtype, rngs=rngs))

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T H W C"]:
        return self.local_module(self.context_module(x))
