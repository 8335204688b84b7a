"""The image autoencoder of Flux, applied to every frame of a video on its own.

Source: hpcaitech/Open-Sora, `opensora/models/vae/autoencoder_2d.py`; black-forest-labs/flux, `modules/autoencoder.py`.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from opensora_jax.models.image_vae import Decoder, Encoder, ImageVAEConfig
from opensora_jax.models.posterior import FIRST_LOGVAR, Posterior
from opensora_jax.models.sizes import latent_size
from opensora_jax.nn.compiled import compiled
from opensora_jax.nn.conv3d import Triple

GROUPS = 32  # of every group norm


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
        if self.ch % GROUPS:
            raise ValueError(f"ch is divisible by {GROUPS}: got {self.ch}.")
        if not self.ch_mult:
            raise ValueError("ch_mult has a number for each level: got none.")
        for name in ("scale_factor", "shift_factor"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != self.z_channels:
                raise ValueError(f"{name} has one number or {self.z_channels}, one a channel: got {len(value)}.")

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

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Returns (frames, height, width) of the latent of a clip.

        Raises: ValueError for sizes that the autoencoder cannot give back, naming the nearest that it can.
        """
        if frames < 1:
            raise ValueError(f"The autoencoder takes 1 frame or more: got {frames}: use 1.")
        return (frames, *latent_size(height, width, self.strides[1]))

    def posterior(self, video: Float[Array, "B T H W C"]) -> Posterior:
        """Returns the Gaussian over unscaled latents of pixels in [-1, 1]; its `frame_kl` has a value per frame."""
        return Posterior.of(self.moments(video))

    @compiled
    def moments(self, video: Float[Array, "B T H W C"]) -> Float[Array, "B T h w M"]:
        """Returns mean and log variance of the unscaled latent on the last axis, as the network gives them."""
        images = rearrange(video, "B T H W C -> (B T) H W C")
        return rearrange(self.encoder(images), "(B T) h w M -> B T h w M", T=video.shape[1])

    def encode(self, video: Float[Array, "B T H W C"], key: Array | None = None) -> Float[Array, "B T h w Z"]:
        """Returns the scaled latent: the posterior's mode, or a draw from it when a key is given."""
        z = self.posterior(video).latent(key)
        return (z - jnp.asarray(self.config.shift_factor)) * jnp.asarray(self.config.scale_factor)

    def decode(self, latent: Float[Array, "B T h w Z"]) -> Float[Array, "B T H W C"]:
        """Returns pixels, about [-1, 1], of a scaled latent."""
        return self.reconstruct(latent / jnp.asarray(self.config.scale_factor) + jnp.asarray(self.config.shift_factor))

    @compiled
    def reconstruct(self, z: Float[Array, "B T h w Z"]) -> Float[Array, "B T H W C"]:
        """Returns pixels of an unscaled latent, as training of the autoencoder itself uses it."""
        images = self.decoder(rearrange(z, "B T h w Z -> (B T) h w Z"))
        return rearrange(images, "(B T) H W C -> B T H W C", T=z.shape[1]).astype(jnp.float32)
