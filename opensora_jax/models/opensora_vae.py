"""The autoencoder of Open-Sora 1.2: SDXL's image autoencoder for every frame, then a temporal one for chunks of frames.

Chunks know nothing of each other, so memory is that of one chunk, and a clip may have any length. Attribute names are
those of the published weights.
Source: hpcaitech/Open-Sora, branch opensora/v1.2, `opensora/models/vae/vae.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Key

from opensora_jax.models.image_vae import Decoder, Encoder, ImageVAEConfig
from opensora_jax.models.posterior import FIRST_LOGVAR, Posterior
from opensora_jax.models.sizes import check_frames, check_least, check_normaliser, latent_size
from opensora_jax.models.temporal_vae import TemporalVAE, TemporalVAEConfig
from opensora_jax.nn.chunks import cut, in_chunks, of_images
from opensora_jax.nn.compiled import compiled
from opensora_jax.nn.conv2d import Conv2d
from opensora_jax.nn.conv3d import Triple

SPATIAL_SCALE = 0.18215  # of latents between the two networks


@dataclass(frozen=True)
class SpatialVAEConfig:
    """Shape of the image autoencoder, in the words of diffusers."""

    in_channels: int
    out_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    norm_num_groups: int

    def __post_init__(self):
        """Check what the layers below rely on."""
        check_least(self, 1, "block_out_channels")
        _ = self.network

    @property
    def network(self) -> ImageVAEConfig:
        """The shape in the terms of the image autoencoder."""
        return ImageVAEConfig(
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            latent_channels=self.latent_channels,
            stem_channels=self.block_out_channels[0],
            block_out_channels=self.block_out_channels,
            layers_per_block=self.layers_per_block,
            norm_num_groups=self.norm_num_groups,
            layout="diffusers",
        )


@dataclass(frozen=True)
class OpenSoraVAEConfig:
    """Both networks, frames and images at a time (None: all), and the latent's mean `shift` and deviation `scale`."""

    vae_2d: SpatialVAEConfig
    vae_temporal: TemporalVAEConfig
    micro_frame_size: int | None
    micro_batch_size: int | None
    shift: float | tuple[float, ...]
    scale: float | tuple[float, ...]

    def __post_init__(self):
        """Check what the layers below rely on."""
        if self.vae_2d.latent_channels != self.vae_temporal.in_out_channels:
            raise ValueError(
                f"vae_temporal.in_out_channels is vae_2d.latent_channels, {self.vae_2d.latent_channels}: "
                f"got {self.vae_temporal.in_out_channels}."
            )
        for name in ("micro_frame_size", "micro_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is at least 1, or None for all at once: got {value}.")
        check_normaliser(self, self.vae_temporal.embed_dim, factor="scale", shift="shift")

    @property
    def strides(self) -> Triple:
        """Pixels (frames, rows, columns) for one latent position."""
        return (self.vae_temporal.stride, self.vae_2d.network.stride, self.vae_2d.network.stride)

    def latent_frames(self, frames: int) -> int:
        """Returns how many latent frames a clip has."""
        chunk = self.micro_frame_size or frames
        chunks, rest = divmod(frames, chunk)
        return chunks * -(-chunk // self.vae_temporal.stride) + -(-rest // self.vae_temporal.stride)

    def fewest_frames(self, latent_frames: int) -> int:
        """Returns how many frames a latent stands for at least; its last chunk may be of up to three more."""
        if self.micro_frame_size is None:
            return 1 + (latent_frames - 1) * self.vae_temporal.stride
        chunks, rest = divmod(latent_frames, self.latent_frames(self.micro_frame_size))
        return chunks * self.micro_frame_size + (1 + (rest - 1) * self.vae_temporal.stride if rest else 0)


class SpatialVAE(nnx.Module):
    """SDXL's image autoencoder: frames to scaled latents of frames, `micro_batch` images at a time."""

    def __init__(self, config: SpatialVAEConfig, micro_batch: int | None, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.micro_batch = micro_batch
        latent = config.latent_channels
        self.encoder = Encoder(config.network, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config.network, dtype=dtype, rngs=rngs)
        self.quant_conv = Conv2d(2 * latent, 2 * latent, 1, dtype=dtype, rngs=rngs)
        self.quant_conv.bias[...] = self.quant_conv.bias[...].at[latent:].set(FIRST_LOGVAR)
        self.post_quant_conv = Conv2d(latent, latent, 1, dtype=dtype, rngs=rngs)

    def encode(
        self, video: Float[Array, "B T H W C"], keys: Key[Array, "B"] | None = None
    ) -> Float[Array, "B T h w Z"]:
        """Returns the scaled latent of every frame: its mode, or a draw when there is a key for each video."""
        moments = of_images(lambda images: self.quant_conv(self.encoder(images)), video, self.micro_batch)
        return SPATIAL_SCALE * Posterior.of(moments).latent(keys)

    def decode(self, latent: Float[Array, "B T h w Z"]) -> Float[Array, "B T H W C"]:
        """Returns the frames of scaled latents."""
        return of_images(lambda z: self.decoder(self.post_quant_conv(z)), latent / SPATIAL_SCALE, self.micro_batch)


class OpenSoraVAE(nnx.Module):
    """Video autoencoder in chunks: `micro_frame_size` frames (17) to a latent frame for every four of them (5)."""

    def __init__(self, config: OpenSoraVAEConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.spatial_vae = SpatialVAE(config.vae_2d, config.micro_batch_size, dtype=dtype, rngs=rngs)
        self.temporal_vae = TemporalVAE(config.vae_temporal, dtype=dtype, rngs=rngs)

    @property
    def strides(self) -> Triple:
        """Frames, rows and columns of pixels for one latent position."""
        return self.config.strides

    @property
    def latent_channels(self) -> int:
        """Channels of the latent."""
        return self.config.vae_temporal.embed_dim

    is_causal = True
    is_decoded_to_frames = True  # a latent stands for several numbers of frames, so `decode` asks for it

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Returns (frames, height, width) of the latent of a clip, which may have any number of frames.

        Raises: ValueError for sizes that the autoencoder cannot give back, naming the nearest that it can.
        """
        check_frames(frames, self.gives_back, "1 frame or more")
        return (self.config.latent_frames(frames), *latent_size(height, width, self.strides[1]))

    def gives_back(self, frames: int) -> bool:
        """Returns whether decoding the latent of so many frames gives all of them."""
        return frames >= 1

    @compiled
    def posterior(self, video: Float[Array, "B T H W C"], keys: Key[Array, "B"] | None = None) -> Posterior:
        """Returns the Gaussian over unscaled latents of pixels in [-1, 1], given latents of the single frames.

        Those are the mode of their own posterior, or a draw from it when there is a key for each video.
        Raises: ValueError for sizes that the autoencoder cannot take.
        """
        self.latent_shape(*video.shape[1:4])
        return Posterior.of(self.moments(self.spatial_vae.encode(video, keys)))

    def moments(self, x: Float[Array, "B T h w C"]) -> Float[Array, "B t h w M"]:
        """Returns mean and log variance of the unscaled latent of frames that `spatial_vae` has encoded."""
        return in_chunks(self.temporal_vae.moments, x, self.config.micro_frame_size, axis=1)

    @compiled
    def encode(
        self, video: Float[Array, "B T H W C"], keys: Key[Array, "B"] | None = None
    ) -> Float[Array, "B t h w Z"]:
        """Returns the scaled latent: both posteriors' modes, or draws from both when there is a key for each video."""
        in_space, in_time = (None, None) if keys is None else jax.vmap(jax.random.split, out_axes=1)(keys)
        z = self.posterior(video, in_space).latent(in_time)
        return (z - jnp.asarray(self.config.shift)) / jnp.asarray(self.config.scale)

    @compiled
    def decode(self, latent: Float[Array, "B t h w Z"], *, frames: int | None = None) -> Float[Array, "B T H W C"]:
        """Returns pixels, about [-1, 1], of a scaled latent: the fewest frames that it can stand for, or `frames`.

        Raises: ValueError when a clip of `frames` has another number of latent frames.
        """
        return self.reconstruct(latent * jnp.asarray(self.config.scale) + jnp.asarray(self.config.shift), frames)

    def decode_parts(
        self, latent: Float[Array, "B t h w Z"], *, frames: int | None = None
    ) -> Iterator[Float[Array, "B T H W C"]]:
        """Yields the frames of `decode` in parts, each chunk as soon as it is ready."""
        frames = self._frames(latent.shape[1], frames)
        size = self.config.micro_frame_size or frames
        chunks = cut(latent, self.config.latent_frames(size), axis=1)
        counts = (min(size, frames - start) for start in range(0, frames, size))
        return (self.decode(chunk, frames=count) for chunk, count in zip(chunks, counts, strict=True))

    def reconstruct(self, z: Float[Array, "B t h w Z"], frames: int | None = None) -> Float[Array, "B T H W C"]:
        """Returns pixels of an unscaled latent, as training of the autoencoder itself uses it."""
        return self.spatial_vae.decode(self.decode_time(z, frames)).astype(jnp.float32)

    def decode_time(self, z: Float[Array, "B t h w Z"], frames: int | None = None) -> Float[Array, "B T h w C"]:
        """Returns the latents of single frames, as `spatial_vae` takes them, of an unscaled latent."""
        frames = self._frames(z.shape[1], frames)
        size = self.config.micro_frame_size or frames
        chunks, rest = divmod(frames, size)
        latents = self.config.latent_frames(size)
        whole, tail = jnp.split(z, [chunks * latents], axis=1)
        parts = [self.temporal_vae.reconstruct(tail, rest)] if rest else []
        if chunks:
            parts.insert(0, in_chunks(lambda part: self.temporal_vae.reconstruct(part, size), whole, latents, axis=1))
        return jnp.concatenate(parts, axis=1)

    def _frames(self, latent_frames: int, frames: int | None) -> int:
        fewest = self.config.fewest_frames(latent_frames)
        frames = fewest if frames is None else frames
        if frames < 1 or self.config.latent_frames(frames) != latent_frames:
            raise ValueError(f"{latent_frames} latent frames are of {fewest} frames or a few more: got {frames}.")
        return frames
