"""The temporal half of Open-Sora 1.2's autoencoder: latents of single frames in, one for every four of them out.

It leaves rows and columns alone. Clips begin with frames of zeros, as many as make their number divisible, and all
convolutions see zeros beyond the borders and before the beginning. Attribute names are those of the published weights.
Source: hpcaitech/Open-Sora, branch opensora/v1.2, `opensora/models/vae/vae_temporal.py`; MAGVIT-v2 (Yu et al. 2023).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from opensora_jax.models.posterior import FIRST_LOGVAR
from opensora_jax.models.sizes import check_least
from opensora_jax.nn.conv3d import conv_frames, orthogonal_point
from opensora_jax.nn.norm import GroupNorm

EPS = 1e-5  # of the group norms


@dataclass(frozen=True)
class TemporalVAEConfig:
    """Shape of the network; level i has `filters * channel_multipliers[i]` channels.

    `temporal_downsample` says of each level but the last whether the number of frames halves after it.
    """

    in_out_channels: int
    latent_embed_dim: int
    embed_dim: int
    filters: int
    num_res_blocks: int
    channel_multipliers: tuple[int, ...]
    temporal_downsample: tuple[bool, ...]
    num_groups: int

    def __post_init__(self):
        """Check what the layers below rely on."""
        check_least(self, 1, "in_out_channels", "latent_embed_dim", "embed_dim", "filters", "num_res_blocks")
        check_least(self, 1, "channel_multipliers", "num_groups")
        if len(self.temporal_downsample) != len(self.channel_multipliers) - 1:
            raise ValueError(
                f"temporal_downsample has one value less than the {len(self.channel_multipliers)} of "
                f"channel_multipliers: got {len(self.temporal_downsample)}."
            )
        if self.filters % self.num_groups:
            raise ValueError(f"filters is divisible by num_groups, {self.num_groups}: got {self.filters}.")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, from the one with most frames on."""
        return tuple(self.filters * multiple for multiple in self.channel_multipliers)

    @property
    def stride(self) -> int:
        """Frames for one latent frame."""
        return 2 ** sum(self.temporal_downsample)


class Weights(nnx.Module):
    """The kernel (time, height, width, in, out) of a convolution and its bias, if it has one."""

    def __init__(self, shape: tuple[int, ...], *, bias: bool, rngs: nnx.Rngs):
        axes = (None, None, None, "embed", "mlp")
        self.kernel = nnx.Param(orthogonal_point(rngs.params(), shape, jnp.float32), axes=axes)
        self.bias = nnx.Param(jnp.zeros((shape[-1],), jnp.float32), axes=("mlp",)) if bias else None


class ZeroCausalConv3d(nnx.Module):
    """A convolution whose output at frame t sees frames up to t; zeros stand for pixels and frames that are not there.

    It is the sum of one 2D convolution per tap of time, without those that would only see zeros. A stride of 2 begins
    with frame 1: outputs are as many as pairs of frames.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        bias: bool = True,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.stride, self.dtype = stride, dtype
        self.conv = Weights((kernel_size, kernel_size, kernel_size, c_in, c_out), bias=bias, rngs=rngs)

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B t H W D"]:
        x, kernel = x.astype(self.dtype), self.conv.kernel[...].astype(self.dtype)
        taps, frames, border = len(kernel), x.shape[1] // self.stride, (len(kernel) // 2,) * 2
        x = jnp.pad(x, ((0, 0), (0, 0), border, border, (0, 0)))
        delays = [taps - self.stride - tap for tap in range(taps)]
        seen = [(tap, delay) for tap, delay in enumerate(delays) if delay <= (frames - 1) * self.stride]
        total = jnp.asarray(sum(self._tap(x, kernel[tap], delay, frames) for tap, delay in seen))
        return (total if self.conv.bias is None else total + self.conv.bias[...]).astype(self.dtype)

    def _tap(self, x: Array, kernel: Array, delay: int, frames: int) -> Array:
        """Returns what one tap adds: output t sees frame t * stride - delay."""
        first = max(0, -(-delay // self.stride))  # the output that sees the first frame that is there
        seen = x[:, first * self.stride - delay :: self.stride][:, : frames - first]
        return jnp.pad(conv_frames(seen, kernel, (1, 1)), ((0, 0), (first, 0), (0, 0), (0, 0), (0, 0)))


class ResBlock(nnx.Module):
    """Norm, SiLU, convolution, twice, around a shortcut, all without bias; the second starts near zero."""

    def __init__(self, c_in: int, c_out: int, groups: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(groups, c_in, eps=EPS, rngs=rngs)
        self.conv1 = ZeroCausalConv3d(c_in, c_out, bias=False, dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(groups, c_out, eps=EPS, rngs=rngs)
        self.conv2 = ZeroCausalConv3d(c_out, c_out, bias=False, dtype=dtype, rngs=rngs)
        self.conv2.conv.kernel[...] *= 0.1
        change = c_in != c_out
        self.conv3 = ZeroCausalConv3d(c_in, c_out, 1, bias=False, dtype=dtype, rngs=rngs) if change else None

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T H W D"]:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (x if self.conv3 is None else self.conv3(x))


def _res_blocks(c_in: int, c_out: int, config: TemporalVAEConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.List:
    widths = [c_in, *[c_out] * (config.num_res_blocks - 1)]
    return nnx.List([ResBlock(width, c_out, config.num_groups, dtype=dtype, rngs=rngs) for width in widths])


def _run(x: Array, layers: Iterable[nnx.Module]) -> Array:
    for layer in layers:
        x = layer(x)
    return x


class Encoder(nnx.Module):
    """Frames' latents to features of the clip, `temporal_downsample` halving the number of frames."""

    def __init__(self, config: TemporalVAEConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        widths = config.widths
        self.conv_in = ZeroCausalConv3d(config.in_out_channels, config.filters, bias=False, dtype=dtype, rngs=rngs)
        self.block_res_blocks = nnx.List(
            [_res_blocks(a, b, config, dtype=dtype, rngs=rngs) for a, b in pairwise((config.filters, *widths))]
        )
        self.conv_blocks = nnx.List(
            [
                ZeroCausalConv3d(width, width, stride=2, dtype=dtype, rngs=rngs) if halves else None
                for width, halves in zip(widths[:-1], config.temporal_downsample, strict=True)
            ]
        )
        self.res_blocks = _res_blocks(widths[-1], widths[-1], config, dtype=dtype, rngs=rngs)
        self.norm1 = GroupNorm(config.num_groups, widths[-1], eps=EPS, rngs=rngs)
        self.conv2 = ZeroCausalConv3d(widths[-1], 2 * config.latent_embed_dim, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B t H W E"]:
        x = self.conv_in(x)
        for blocks, halve in zip(self.block_res_blocks, (*self.conv_blocks, None), strict=True):
            x = _run(x, blocks)
            x = x if halve is None else halve(x)
        x = _run(x, self.res_blocks)
        return self.conv2(jax.nn.silu(self.norm1(x)))


class Decoder(nnx.Module):
    """The encoder backwards: a level's frames double before the next finer one. Lists begin with the finest level."""

    def __init__(self, config: TemporalVAEConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        widths = config.widths
        self.conv1 = ZeroCausalConv3d(config.latent_embed_dim, widths[-1], dtype=dtype, rngs=rngs)
        self.res_blocks = _res_blocks(widths[-1], widths[-1], config, dtype=dtype, rngs=rngs)
        self.block_res_blocks = nnx.List(
            [_res_blocks(b, a, config, dtype=dtype, rngs=rngs) for a, b in pairwise((*widths, widths[-1]))]
        )
        self.conv_blocks = nnx.List(
            [
                ZeroCausalConv3d(width, 2 * width, dtype=dtype, rngs=rngs) if doubles else None
                for width, doubles in zip(widths[1:], config.temporal_downsample, strict=True)
            ]
        )
        self.norm1 = GroupNorm(config.num_groups, widths[0], eps=EPS, rngs=rngs)
        self.conv_out = ZeroCausalConv3d(widths[0], config.in_out_channels, dtype=dtype, rngs=rngs)

    def __call__(self, z: Float[Array, "B t H W E"]) -> Float[Array, "B T H W C"]:
        x = _run(self.conv1(z), self.res_blocks)
        for blocks, double in zip(reversed(self.block_res_blocks), (*reversed(self.conv_blocks), None), strict=True):
            x = _run(x, blocks)
            if double is not None:
                x = rearrange(double(x), "B T H W (C s) -> B (T s) H W C", s=2)
        return self.conv_out(jax.nn.silu(self.norm1(x)))


class TemporalVAE(nnx.Module):
    """Any number of frames to a latent frame for every `stride` of them, the first of which may stand for fewer."""

    def __init__(self, config: TemporalVAEConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        embed, latent = config.embed_dim, config.latent_embed_dim
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.quant_conv = ZeroCausalConv3d(2 * latent, 2 * embed, 1, dtype=dtype, rngs=rngs)
        assert self.quant_conv.conv.bias is not None
        self.quant_conv.conv.bias[...] = self.quant_conv.conv.bias[...].at[embed:].set(FIRST_LOGVAR)
        self.post_quant_conv = ZeroCausalConv3d(embed, latent, 1, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)

    def moments(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B t H W M"]:
        """Returns mean and log variance of the latent on the last axis, as the network gives them."""
        missing = -x.shape[1] % self.config.stride
        x = jnp.pad(x, ((0, 0), (missing, 0), (0, 0), (0, 0), (0, 0)))
        return self.quant_conv(self.encoder(x))

    def reconstruct(self, z: Float[Array, "B t H W Z"], frames: int) -> Float[Array, "B T H W C"]:
        """Returns that many frames of a latent, those before them left out."""
        return self.decoder(self.post_quant_conv(z))[:, -frames % self.config.stride :]
