"""The deep-compression video autoencoder of Open-Sora 2.0: 32 x 32 pixels and four frames for a latent position.

It is not causal and has no posterior. Around every change of resolution a shortcut without parameters carries the
pixels in channels. Attribute names are those of the published weights; the blocks are in `nn.efficient_vit`.
Source: DC-AE (Chen et al. 2024, arXiv:2410.10733); hpcaitech/Open-Sora, `opensora/models/dc_ae/`.
"""

from collections.abc import Iterator

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Key

from opensora_jax.models.dc_ae_config import DCAEConfig, DecoderConfig, EncoderConfig
from opensora_jax.models.sizes import check_frames, latent_size
from opensora_jax.nn.compiled import compiled
from opensora_jax.nn.conv import Conv
from opensora_jax.nn.conv3d import Triple
from opensora_jax.nn.efficient_vit import (
    ACTIVATIONS,
    ConvLayer,
    EfficientViTBlock,
    ResBlock,
    Residual,
    make_norm,
)
from opensora_jax.nn.pixel_shuffle import (
    Averaging,
    Duplicating,
    factors_of,
    grow_nearest,
    pixel_shuffle,
    pixel_unshuffle,
)
from opensora_jax.nn.tiling import Tiling, decoded_parts, join_frames, tiled_encode

Kernel = tuple[int, ...]  # sizes, (time, height, width) or without time
SCALES = {"EViT_GLU": (), "EViTS5_GLU": (5,)}  # kernel sizes at which attention sees queries, keys and values


class Activation(nnx.Module):
    """An activation as a member of a sequence."""

    def __init__(self, name: str):
        self.function = ACTIVATIONS[name]

    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        return self.function(x)


class Sequence(nnx.Module):
    """Layers one after the other."""

    def __init__(self, layers: list[nnx.Module]):
        self.op_list = nnx.List(layers)

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B t h w D"]:
        for layer in self.op_list:
            x = layer(x)
        return x


class ConvUnshuffle(nnx.Module):
    """A convolution, then blocks of its pixels as channels."""

    def __init__(self, c_in: int, c_out: int, rank: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = ConvLayer(Conv(c_in, c_out // 4, (3,) * rank, dtype=dtype, rngs=rngs))

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T h w D"]:
        return pixel_unshuffle(self.conv(x), (1, 2, 2))


class ConvShuffle(nnx.Module):
    """A convolution, then its channels as blocks of pixels."""

    def __init__(self, c_in: int, c_out: int, rank: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = ConvLayer(Conv(c_in, c_out * 4, (3,) * rank, dtype=dtype, rngs=rngs))

    def __call__(self, x: Float[Array, "B T h w C"]) -> Float[Array, "B T H W D"]:
        return pixel_shuffle(self.conv(x), (1, 2, 2))


class InterpolateConv(nnx.Module):
    """Nearest-neighbour growth, in time too where there is more than one frame, then a convolution."""

    def __init__(self, c_in: int, c_out: int, rank: int, in_time: bool, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.in_time = in_time
        self.conv = ConvLayer(Conv(c_in, c_out, (3,) * rank, dtype=dtype, rngs=rngs))

    def __call__(self, x: Float[Array, "B t h w C"]) -> Float[Array, "B T H W D"]:
        return self.conv(grow_nearest(x, factors_of(x, 2, self.in_time)))


def make_block(
    kind: str, width: int, rank: int, norm: str | None, act: str, *, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Module:
    """Returns a block that keeps the shape: `ResBlock` with its residual, or one of EfficientViT."""
    if kind == "ResBlock":
        return Residual(ResBlock(width, rank, norm, act, dtype=dtype, rngs=rngs))
    return EfficientViTBlock(width, rank, norm, act, SCALES[kind], dtype=dtype, rngs=rngs)


def make_downsample(
    config: EncoderConfig, c_in: int, c_out: int, in_time: bool, *, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Module:
    """Returns a layer that halves rows and columns, and frames where `in_time`."""
    main: nnx.Module
    if config.downsample_block_type == "ConvPixelUnshuffle":
        main = ConvUnshuffle(c_in, c_out, config.rank, dtype=dtype, rngs=rngs)
    else:
        strides = (1 + in_time, 2, 2)
        main = ConvLayer(Conv(c_in, c_out, (3,) * config.rank, strides=strides, dtype=dtype, rngs=rngs))
    return main if config.downsample_shortcut is None else Residual(main, Averaging(c_out, 2, in_time))


def make_upsample(
    config: DecoderConfig, c_in: int, c_out: int, in_time: bool, *, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Module:
    """Returns a layer that doubles rows and columns, and frames where `in_time`."""
    main: nnx.Module
    if config.upsample_block_type == "ConvPixelShuffle":
        main = ConvShuffle(c_in, c_out, config.rank, dtype=dtype, rngs=rngs)
    else:
        main = InterpolateConv(c_in, c_out, config.rank, in_time, dtype=dtype, rngs=rngs)
    return main if config.upsample_shortcut is None else Residual(main, Duplicating(c_out, 2, in_time))


def make_encoder_out(
    config: EncoderConfig, c_in: int, c_out: int, kernel: Kernel, *, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Module:
    """Returns the layer that gives the latent: a convolution, without norm or activation."""
    main = Sequence([ConvLayer(Conv(c_in, c_out, kernel, dtype=dtype, rngs=rngs))])
    return main if config.out_shortcut is None else Residual(main, Averaging(c_out, 1))


def make_decoder_in(
    config: DecoderConfig, c_in: int, c_out: int, kernel: Kernel, *, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Module:
    """Returns the layer that takes the latent."""
    main = ConvLayer(Conv(c_in, c_out, kernel, dtype=dtype, rngs=rngs))
    return main if config.in_shortcut is None else Residual(main, Duplicating(c_out, 1))


def make_decoder_out(
    config: DecoderConfig, c_in: int, c_out: int, kernel: Kernel, *, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Module:
    """Returns the layer that gives pixels: norm, activation, convolution."""
    norm = make_norm(config.out_norm, c_in, rngs)
    conv = ConvLayer(Conv(c_in, c_out, kernel, dtype=dtype, rngs=rngs))
    return Sequence([*([] if norm is None else [norm]), Activation(config.out_act), conv])


class Encoder(nnx.Module):
    """Pixels to the latent, not yet scaled."""

    def __init__(self, config: DCAEConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        own, kernel = config.encoder, (3,) * config.encoder.rank
        widths = own.width_list
        self.project_in = ConvLayer(Conv(config.in_channels, widths[0], kernel, dtype=dtype, rngs=rngs))
        stages: list[nnx.Module] = []
        for i, (width, kinds, norm, act) in enumerate(zip(widths, own.blocks, own.norms, own.acts, strict=True)):
            layers = [make_block(kind, width, own.rank, norm, act, dtype=dtype, rngs=rngs) for kind in kinds]
            if i + 1 < len(widths):
                layers.append(make_downsample(own, width, widths[i + 1], own.in_time[i], dtype=dtype, rngs=rngs))
            stages.append(Sequence(layers))
        self.stages = nnx.List(stages)
        self.project_out = make_encoder_out(own, widths[-1], config.latent_channels, kernel, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B t h w Z"]:
        x = self.project_in(x)
        for stage in self.stages:
            x = stage(x)
        return self.project_out(x)


class Decoder(nnx.Module):
    """Latent to pixels; stages are numbered as in the encoder, so they run from the last to the first."""

    def __init__(self, config: DCAEConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        own, kernel = config.decoder, (3,) * config.decoder.rank
        widths = own.width_list
        self.project_in = make_decoder_in(own, config.latent_channels, widths[-1], kernel, dtype=dtype, rngs=rngs)
        stages: list[nnx.Module] = []
        for i, (width, kinds, norm, act) in enumerate(zip(widths, own.blocks, own.norms, own.acts, strict=True)):
            layers = [make_block(kind, width, own.rank, norm, act, dtype=dtype, rngs=rngs) for kind in kinds]
            if i + 1 < len(widths):
                layers.insert(0, make_upsample(own, widths[i + 1], width, own.in_time[i], dtype=dtype, rngs=rngs))
            stages.append(Sequence(layers))
        self.stages = nnx.List(stages)
        self.project_out = make_decoder_out(own, widths[0], config.in_channels, kernel, dtype=dtype, rngs=rngs)

    def __call__(self, z: Float[Array, "B t h w Z"]) -> Float[Array, "B T H W C"]:
        x = self.project_in(z)
        for stage in reversed(self.stages):
            x = stage(x)
        return self.project_out(x)


class DCAE(nnx.Module):
    """Video autoencoder: 4 n frames to n latent frames (4 the stride in time), or one frame to one.

    One latent frame alone is decoded as an image: a clip of 4 frames comes back as 1, and so does a temporal tile.
    """

    def __init__(self, config: DCAEConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)

    @property
    def strides(self) -> Triple:
        """Frames, rows and columns of pixels for one latent position."""
        return self.config.strides

    @property
    def latent_channels(self) -> int:
        """Channels of the latent."""
        return self.config.latent_channels

    is_causal = False

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Returns (frames, height, width) of the latent of a clip.

        Raises: ValueError for sizes that the autoencoder cannot take, naming the nearest that it can.
        """
        t = self.strides[0]
        check_frames(frames, lambda n: n == 1 or n % t == 0, f"1 frame or {t} n")
        return (max(1, frames // t), *latent_size(height, width, self.strides[1]))

    @property
    def tiling(self) -> Tiling:
        """How videos that are larger than a tile are cut."""
        return self.config.tiling

    def gives_back(self, frames: int) -> bool:
        """Returns whether decoding the latent of so many frames gives all of them."""
        latents, rest = divmod(frames, self.strides[0])
        if frames == 1 or latents < 1 or rest:
            return frames == 1
        return self.strides[0] == 1 or min(self.tiling.latent_tiles(latents)) > 1

    def encode(
        self, video: Float[Array, "B T H W C"], keys: Key[Array, "B"] | None = None
    ) -> Float[Array, "B t h w Z"]:
        """Returns the latent over `scaling_factor`; there is no posterior, so keys draw nothing.

        Raises: ValueError for sizes that the autoencoder cannot take.
        """
        return self.unscaled(video) / self._scale

    def unscaled(self, video: Float[Array, "B T H W C"]) -> Float[Array, "B t h w Z"]:
        """Returns the unscaled latent, in tiles where the video is larger than one."""
        self.latent_shape(*video.shape[1:4])
        return tiled_encode(self.tiling, video, self.project)

    def decode(self, latent: Float[Array, "B t h w Z"]) -> Float[Array, "B T H W C"]:
        """Returns pixels, about [-1, 1], of a scaled latent."""
        return join_frames(self.decode_parts(latent))

    def decode_parts(self, latent: Float[Array, "B t h w Z"]) -> Iterator[Float[Array, "B T H W C"]]:
        """Yields the frames of `decode` in parts, each as soon as it is ready; temporal tiles make several."""
        return decoded_parts(self.tiling, latent * self._scale, self.reconstruct)

    @compiled
    def project(self, video: Float[Array, "B T H W C"]) -> Float[Array, "B t h w Z"]:
        """Returns the unscaled latent of pixels in [-1, 1], untiled, as training of the autoencoder itself uses it."""
        return _as_images(self.encoder, video, self.config.is_video).astype(jnp.float32)

    @compiled
    def reconstruct(self, z: Float[Array, "B t h w Z"]) -> Float[Array, "B T H W C"]:
        """Returns pixels of an unscaled latent, untiled, as training of the autoencoder itself uses it."""
        return _as_images(self.decoder, z, self.config.is_video).astype(jnp.float32)

    @property
    def _scale(self) -> float:
        return 1.0 if self.config.scaling_factor is None else self.config.scaling_factor


def _as_images(network: nnx.Module, x: Array, is_video: bool) -> Array:
    """Returns what a network gives, an image network frame by frame."""
    if is_video:
        return network(x)
    frames = network(rearrange(x, "B T H W C -> (B T) 1 H W C"))
    return rearrange(frames, "(B T) 1 H W C -> B T H W C", B=len(x))
