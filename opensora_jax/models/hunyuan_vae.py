"""The causal 3D autoencoder of HunyuanVideo, as Open-Sora 2.0 uses it: one latent frame for the first frame, then one
for every four (or eight). Attribute names are those of the published weights.

Source: hpcaitech/Open-Sora, `opensora/models/hunyuan_vae/`; HunyuanVideo (Kong et al. 2024), section 4.1.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Key

from opensora_jax.models.posterior import FIRST_LOGVAR, Posterior
from opensora_jax.models.sizes import check_frames, check_least, check_normaliser, latent_size
from opensora_jax.nn.compiled import compiled
from opensora_jax.nn.conv3d import CausalConv3d, Conv3d, Triple, orthogonal_blur
from opensora_jax.nn.frame_attention import frame_causal_attention
from opensora_jax.nn.linear import Linear
from opensora_jax.nn.norm import GroupNorm
from opensora_jax.nn.tiling import Tiling, decoded_parts, join_frames, tiled_encode


@dataclass(frozen=True)
class HunyuanVAEConfig:
    """Shape of the network; `scale_factor` and `shift_factor` (one number, or one per channel) normalise the latent.

    `encode` and `decode` work in tiles of `sample_size` pixels squared and `sample_tsize` frames where tiling is used.
    """

    in_channels: int
    out_channels: int
    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    time_compression_ratio: int
    spatial_compression_ratio: int
    mid_block_add_attention: bool
    scale_factor: float | tuple[float, ...]
    shift_factor: float | tuple[float, ...]
    use_spatial_tiling: bool = False
    use_temporal_tiling: bool = False
    sample_size: int = 256
    sample_tsize: int = 64
    tile_overlap_factor: float = 0.25

    def __post_init__(self):
        """Check what the layers below and tiling rely on."""
        check_least(self, 1, "in_channels", "out_channels", "latent_channels", "block_out_channels")
        check_least(self, 1, "layers_per_block", "norm_num_groups")
        if any(channels % self.norm_num_groups for channels in self.block_out_channels):
            raise ValueError(
                f"norm_num_groups divides all of block_out_channels: got {self.norm_num_groups} and "
                f"{self.block_out_channels}."
            )
        if self.time_compression_ratio not in (4, 8):
            raise ValueError(f"time_compression_ratio is 4 or 8: got {self.time_compression_ratio}.")
        if self.spatial_compression_ratio not in [2**i for i in range(1, len(self.block_out_channels) + 1)]:
            raise ValueError(
                f"spatial_compression_ratio is a power of two up to 2^{len(self.block_out_channels)} for "
                f"{len(self.block_out_channels)} levels: got {self.spatial_compression_ratio}."
            )
        if self.strides[0] != self.time_compression_ratio:
            raise ValueError(
                f"{len(self.block_out_channels)} levels with a spatial_compression_ratio of "
                f"{self.spatial_compression_ratio} shrink time by {self.strides[0]}: got a time_compression_ratio of "
                f"{self.time_compression_ratio}."
            )
        check_normaliser(self, self.latent_channels, factor="scale_factor", shift="shift_factor")
        _ = self.tiling

    @property
    def tiling(self) -> Tiling:
        """How `encode` and `decode` cut; tiles of latents follow from those of pixels."""
        return Tiling(
            self.strides,
            is_causal=True,
            use_spatial_tiling=self.use_spatial_tiling,
            use_temporal_tiling=self.use_temporal_tiling,
            spatial_tile_size=self.sample_size,
            temporal_tile_size=self.sample_tsize,
            tile_overlap_factor=self.tile_overlap_factor,
        )

    @property
    def level_strides(self) -> tuple[Triple, ...]:
        """(time, height, width) stride after each level, the same list for encoder and decoder."""
        levels = len(self.block_out_channels)
        space, time = (round(math.log2(r)) for r in (self.spatial_compression_ratio, self.time_compression_ratio))
        if self.time_compression_ratio == 4:
            in_time = [levels - 1 - time <= i < levels - 1 for i in range(levels)]
        else:
            in_time = [i < space for i in range(levels)]
        return tuple((1 + t, 1 + (i < space), 1 + (i < space)) for i, t in enumerate(in_time))

    @property
    def strides(self) -> Triple:
        """Pixels (frames, rows, columns) for one latent position."""
        return tuple(math.prod(axis) for axis in zip(*self.level_strides, strict=True))


class ResnetBlock(nnx.Module):
    """Norm, SiLU, convolution, twice, around a shortcut; the second convolution starts near zero."""

    def __init__(self, c_in: int, c_out: int, groups: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(groups, c_in, rngs=rngs)
        self.conv1 = CausalConv3d(c_in, c_out, dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(groups, c_out, rngs=rngs)
        self.conv2 = CausalConv3d(c_out, c_out, dtype=dtype, rngs=rngs)
        self.conv2.conv.kernel[...] *= 0.1
        self.conv_shortcut = CausalConv3d(c_in, c_out, 1, dtype=dtype, rngs=rngs) if c_in != c_out else None

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T H W D"]:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class FrameCausalAttention(nnx.Module):
    """One head over all positions of this and earlier frames, with its own group norm and a residual."""

    def __init__(self, channels: int, groups: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.group_norm = GroupNorm(groups, channels, rngs=rngs)
        self.to_q = Linear(channels, channels, dtype=dtype, rngs=rngs)
        self.to_k = Linear(channels, channels, dtype=dtype, rngs=rngs)
        self.to_v = Linear(channels, channels, dtype=dtype, rngs=rngs)
        self.to_out = Linear(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T H W C"]:
        h = self.group_norm(x)
        return x + self.to_out(frame_causal_attention(self.to_q(h), self.to_k(h), self.to_v(h)))


class MidBlock(nnx.Module):
    """Resnet, attention, resnet at the coarsest level."""

    def __init__(self, config: HunyuanVAEConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        channels, groups = config.block_out_channels[-1], config.norm_num_groups
        self.resnets = nnx.List([ResnetBlock(channels, channels, groups, dtype=dtype, rngs=rngs) for _ in range(2)])
        attend = config.mid_block_add_attention
        self.attentions = nnx.List([FrameCausalAttention(channels, groups, dtype=dtype, rngs=rngs)] if attend else [])

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T H W C"]:
        x = self.resnets[0](x)
        for attend in self.attentions:
            x = attend(x)
        return self.resnets[1](x)


class Downsample(nnx.Module):
    """A strided causal convolution."""

    def __init__(self, channels: int, strides: Triple, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = CausalConv3d(
            channels, channels, strides=strides, kernel_init=orthogonal_blur, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B t h w C"]:
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest-neighbour growth, then a convolution; the first frame does not grow in time (T -> 2T - 1)."""

    def __init__(self, channels: int, factors: Triple, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.factors = factors
        self.conv = CausalConv3d(channels, channels, kernel_init=orthogonal_blur, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B t h w C"]:
        for axis, factor in enumerate(self.factors, start=1):
            if factor > 1:
                x = jnp.repeat(x, factor, axis=axis)
        return self.conv(x[:, self.factors[0] - 1 :])


def _resnets(c_in: int, c_out: int, layers: int, groups: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.List:
    widths = [c_in] + [c_out] * layers
    return nnx.List([ResnetBlock(a, b, groups, dtype=dtype, rngs=rngs) for a, b in pairwise(widths)])


def _run(x: Array, *lists: nnx.List) -> Array:
    for layer in chain(*lists):
        x = layer(x)
    return x


class DownLevel(nnx.Module):
    """Resnets at one resolution, then a strided convolution unless all strides are 1."""

    def __init__(
        self, c_in: int, c_out: int, strides: Triple, layers: int, groups: int, *, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.resnets = _resnets(c_in, c_out, layers, groups, dtype=dtype, rngs=rngs)
        resample = max(strides) > 1
        self.downsamplers = nnx.List([Downsample(c_out, strides, dtype=dtype, rngs=rngs)] if resample else [])

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B t h w D"]:
        return _run(x, self.resnets, self.downsamplers)


class UpLevel(nnx.Module):
    """Resnets at one resolution, then growth unless all factors are 1."""

    def __init__(
        self, c_in: int, c_out: int, factors: Triple, layers: int, groups: int, *, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.resnets = _resnets(c_in, c_out, layers, groups, dtype=dtype, rngs=rngs)
        resample = max(factors) > 1
        self.upsamplers = nnx.List([Upsample(c_out, factors, dtype=dtype, rngs=rngs)] if resample else [])

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B t h w D"]:
        return _run(x, self.resnets, self.upsamplers)


class Encoder(nnx.Module):
    """Pixels to the mean and log variance of the latent, before the 1x1 `quant_conv`."""

    def __init__(self, config: HunyuanVAEConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = CausalConv3d(config.in_channels, widths[0], dtype=dtype, rngs=rngs)
        self.down_blocks = nnx.List(
            [
                DownLevel(a, b, strides, config.layers_per_block, groups, dtype=dtype, rngs=rngs)
                for a, b, strides in zip((widths[0], *widths), widths, config.level_strides, strict=False)
            ]
        )
        self.mid_block = MidBlock(config, dtype=dtype, rngs=rngs)
        self.conv_norm_out = GroupNorm(groups, widths[-1], rngs=rngs)
        self.conv_out = CausalConv3d(widths[-1], 2 * config.latent_channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B t h w Z"]:
        x = self.mid_block(_run(self.conv_in(x), self.down_blocks))
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class Decoder(nnx.Module):
    """Latent to pixels. No mirror of the encoder: the strides come in the same order, so time grows last."""

    def __init__(self, config: HunyuanVAEConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = CausalConv3d(config.latent_channels, widths[0], dtype=dtype, rngs=rngs)
        self.mid_block = MidBlock(config, dtype=dtype, rngs=rngs)
        self.up_blocks = nnx.List(
            [
                UpLevel(a, b, factors, config.layers_per_block + 1, groups, dtype=dtype, rngs=rngs)
                for a, b, factors in zip((widths[0], *widths), widths, config.level_strides, strict=False)
            ]
        )
        self.conv_norm_out = GroupNorm(groups, widths[-1], rngs=rngs)
        self.conv_out = CausalConv3d(widths[-1], config.out_channels, dtype=dtype, rngs=rngs)

    def __call__(self, z: Float[Array, "B t h w Z"]) -> Float[Array, "B T H W C"]:
        x = _run(self.mid_block(self.conv_in(z)), self.up_blocks)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class HunyuanVAE(nnx.Module):
    """Causal video autoencoder: 1 + k n frames to 1 + n latent frames, k the time stride."""

    def __init__(self, config: HunyuanVAEConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        latent = config.latent_channels
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)
        self.quant_conv = Conv3d(2 * latent, 2 * latent, 1, dtype=dtype, rngs=rngs)
        self.quant_conv.bias[...] = self.quant_conv.bias[...].at[latent:].set(FIRST_LOGVAR)
        self.post_quant_conv = Conv3d(latent, latent, 1, dtype=dtype, rngs=rngs)

    @property
    def strides(self) -> Triple:
        """Frames, rows and columns of pixels for one latent position."""
        return self.config.strides

    @property
    def latent_channels(self) -> int:
        """Channels of the latent."""
        return self.config.latent_channels

    is_causal = True

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Returns (frames, height, width) of the latent of a clip.

        Raises: ValueError for sizes that the autoencoder cannot give back, naming the nearest that it can.
        """
        t = self.strides[0]
        check_frames(frames, self.gives_back, f"1 + {t} n frames")
        return ((frames - 1) // t + 1, *latent_size(height, width, self.strides[1]))

    @property
    def tiling(self) -> Tiling:
        """How videos that are larger than a tile are cut."""
        return self.config.tiling

    def gives_back(self, frames: int) -> bool:
        """Returns whether decoding the latent of so many frames gives all of them."""
        return frames >= 1 and (frames - 1) % self.strides[0] == 0

    def posterior(self, video: Float[Array, "B T H W C"]) -> Posterior:
        """Returns the Gaussian over unscaled latents of pixels in [-1, 1]; log variance clipped to [-30, 20].

        Of a video larger than a tile it comes from the blended moments of tiles.
        Raises: ValueError for sizes that the autoencoder cannot take.
        """
        self.latent_shape(*video.shape[1:4])
        return Posterior.of(tiled_encode(self.tiling, video, self.moments))

    @compiled
    def moments(self, video: Float[Array, "B T H W C"]) -> Float[Array, "B t h w M"]:
        """Returns mean and log variance of the unscaled latent on the last axis, as the network gives them, untiled."""
        return self.quant_conv(self.encoder(video))

    def encode(
        self, video: Float[Array, "B T H W C"], keys: Key[Array, "B"] | None = None
    ) -> Float[Array, "B t h w Z"]:
        """Returns the scaled latent: the posterior's mode, or a draw from it when there is a key for each video."""
        z = self.posterior(video).latent(keys)
        return (z - jnp.asarray(self.config.shift_factor)) * jnp.asarray(self.config.scale_factor)

    def decode(self, latent: Float[Array, "B t h w Z"]) -> Float[Array, "B T H W C"]:
        """Returns pixels, about [-1, 1], of a scaled latent."""
        return join_frames(self.decode_parts(latent))

    def decode_parts(self, latent: Float[Array, "B t h w Z"]) -> Iterator[Float[Array, "B T H W C"]]:
        """Yields the frames of `decode` in parts, each as soon as it is ready; temporal tiles make several."""
        z = latent / jnp.asarray(self.config.scale_factor) + jnp.asarray(self.config.shift_factor)
        return decoded_parts(self.tiling, z, self.reconstruct)

    @compiled
    def reconstruct(self, z: Float[Array, "B t h w Z"]) -> Float[Array, "B T H W C"]:
        """Returns pixels of an unscaled latent, untiled, as training of the autoencoder itself uses it."""
        return self.decoder(self.post_quant_conv(z)).astype(jnp.float32)
