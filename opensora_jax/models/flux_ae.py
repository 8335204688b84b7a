"""The image autoencoder of Flux, applied to every frame of a video on its own.

Source: hpcaitech/Open-Sora, `opensora/models/vae/autoencoder_2d.py`; black-forest-labs/flux, `modules/autoencoder.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Key

from opensora_jax.models.image_vae import Decoder, Encoder, ImageVAEConfig
from opensora_jax.models.posterior import FIRST_LOGVAR, Posterior
from opensora_jax.models.sizes import check_frames, check_least, check_normaliser, latent_size
from opensora_jax.nn.chunks import cut, of_images
from opensora_jax.nn.compiled import compiled
from opensora_jax.nn.conv3d import Triple

GROUPS = 32  # of every group norm
PIXELS_AT_ONCE = 2**20  # as many images as have so many pixels, with 128 channels 0.5 GB in float32, run at a time


@dataclass(frozen=True)
class FluxAEConfig:
    """Shape of the network; `ch * ch_mult` are the channels of its levels, the finest first.

    `resolution` is the size that it was trained at: any size divisible by the stride is taken. `scale_factor` and
    `shift_factor` (one number, or one per channel) normalise the latent.
    """

    resolution: int
    in_channels: int
    ch: int
    out_ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    z_channels: int
    scale_factor: float | tuple[float, ...]
    shift_factor: float | tuple[float, ...]

    def __post_init__(self):
        """Check what the layers below rely on."""
        check_least(self, 1, "in_channels", "out_ch", "ch", "ch_mult", "num_res_blocks", "z_channels")
        if self.ch % GROUPS:
            raise ValueError(f"ch is divisible by {GROUPS}: got {self.ch}.")
        check_normaliser(self, self.z_channels, factor="scale_factor", shift="shift_factor")

    @property
    def network(self) -> ImageVAEConfig:
        """The shape in the terms of the image autoencoder."""
        return ImageVAEConfig(
            in_channels=self.in_channels,
            out_channels=self.out_ch,
            latent_channels=self.z_channels,
            stem_channels=self.ch,
            block_out_channels=tuple(self.ch * multiple for multiple in self.ch_mult),
            layers_per_block=self.num_res_blocks,
            norm_num_groups=GROUPS,
            layout="ldm",
        )

    @property
    def strides(self) -> Triple:
        """Pixels (frames, rows, columns) for one latent position."""
        return (1, self.network.stride, self.network.stride)


class FluxAE(nnx.Module):
    """Image autoencoder for videos: as many latent frames as frames, of which none knows the others."""

    def __init__(self, config: FluxAEConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config.network, dtype=dtype, rngs=rngs)
        self.encoder.conv_out.bias[...] = self.encoder.conv_out.bias[...].at[config.z_channels :].set(FIRST_LOGVAR)
        self.decoder = Decoder(config.network, dtype=dtype, rngs=rngs)

    @property
    def strides(self) -> Triple:
        """Frames, rows and columns of pixels for one latent position."""
        return self.config.strides

    @property
    def latent_channels(self) -> int:
        """Channels of the latent."""
        return self.config.z_channels

    is_causal = True
    frames_apart = True  # each is an image to it

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Returns (frames, height, width) of the latent of a clip.

        Raises: ValueError for sizes that the autoencoder cannot give back, naming the nearest that it can.
        """
        check_frames(frames, self.gives_back, "1 frame or more")
        return (frames, *latent_size(height, width, self.strides[1]))

    def gives_back(self, frames: int) -> bool:
        """Returns whether decoding the latent of so many frames gives all of them."""
        return frames >= 1

    def posterior(self, video: Float[Array, "B T H W C"]) -> Posterior:
        """Returns the Gaussian over unscaled latents of pixels in [-1, 1]; its `frame_kl` has a value per frame.

        Raises: ValueError for sizes that the autoencoder cannot take.
        """
        self.latent_shape(*video.shape[1:4])
        return Posterior.of(self.moments(video))

    @compiled
    def moments(self, video: Float[Array, "B T H W C"]) -> Float[Array, "B T h w M"]:
        """Returns mean and log variance of the unscaled latent on the last axis, as the network gives them."""
        return of_images(self.encoder, video, self._images(*video.shape[2:4], stride=1))

    def encode(
        self, video: Float[Array, "B T H W C"], keys: Key[Array, "B"] | None = None
    ) -> Float[Array, "B T h w Z"]:
        """Returns the scaled latent: the posterior's mode, or a draw from it when there is a key for each video."""
        z = self.posterior(video).latent(keys)
        return (z - jnp.asarray(self.config.shift_factor)) * jnp.asarray(self.config.scale_factor)

    def decode(self, latent: Float[Array, "B T h w Z"]) -> Float[Array, "B T H W C"]:
        """Returns pixels, about [-1, 1], of a scaled latent."""
        return self.reconstruct(self._unscaled(latent))

    def decode_parts(self, latent: Float[Array, "B T h w Z"]) -> Iterator[Float[Array, "B T H W C"]]:
        """Yields the frames of `decode` in parts, each as soon as it is ready."""
        frames = max(1, self._images(*latent.shape[2:4], stride=self.strides[1]) // len(latent))
        return map(self.reconstruct, cut(self._unscaled(latent), frames, axis=1))

    @compiled
    def reconstruct(self, z: Float[Array, "B T h w Z"]) -> Float[Array, "B T H W C"]:
        """Returns pixels of an unscaled latent, as training of the autoencoder itself uses it."""
        images = self._images(*z.shape[2:4], stride=self.strides[1])
        return of_images(self.decoder, z, images).astype(jnp.float32)

    def _unscaled(self, latent: Array) -> Array:
        return latent / jnp.asarray(self.config.scale_factor) + jnp.asarray(self.config.shift_factor)

    @staticmethod
    def _images(height: int, width: int, *, stride: int) -> int:
        """Returns how many images run at a time, of a size counted in steps of `stride` pixels."""
        return max(1, PIXELS_AT_ONCE // (height * width * stride**2))
