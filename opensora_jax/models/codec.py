"""An autoencoder at work on a mesh: bytes to latents and latents to bytes, whatever the network.

A batch is split over the devices, in space where there are fewer videos than devices, with the result of one device.
Methods run outside `jax.jit`: networks compile their own parts, and tiles, where a config asks for them, run in turn.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float, Key, UInt8

from opensora_jax.config.errors import UserError
from opensora_jax.parallel.batch import video_sharding

Video = UInt8[Array, "B T H W 3"] | UInt8[np.ndarray, "B T H W 3"]


@jax.jit
def to_pixels(video: UInt8[Array, "B T H W 3"]) -> Float[Array, "B T H W 3"]:
    """Returns bytes as pixels in [-1, 1]."""
    return video.astype(jnp.float32) / 127.5 - 1.0


@jax.jit
def to_bytes(pixels: Float[Array, "B T H W 3"]) -> UInt8[Array, "B T H W 3"]:
    """Returns pixels in [-1, 1], clipped, as bytes."""
    return jnp.floor((jnp.clip(pixels.astype(jnp.float32), -1.0, 1.0) + 1.0) * 127.5 + 0.5).astype(jnp.uint8)


@dataclass(frozen=True)
class Codec:
    """An autoencoder with its parameters, and the mesh to run on."""

    autoencoder: Any
    mesh: Mesh

    def encode(self, video: Video | np.ndarray | Array, keys: Key[Array, "B"] | None = None) -> Array:
        """Returns scaled latents of videos, which are bytes or pixels in [-1, 1].

        They are modes of the posterior, or draws from it when there is a key for each video.
        Raises: UserError for sizes that the autoencoder cannot take, and for pixels that are no numbers.
        """
        pixels = self._pixels(video)
        if keys is None:
            return self.autoencoder.encode(pixels)
        return jax.vmap(lambda clip, key: self.autoencoder.encode(clip[None], key)[0])(pixels, keys)

    def decode(self, latents: Float[Array, "B t h w Z"], frames: int) -> UInt8[Array, "B T H W 3"]:
        """Returns the videos of scaled latents, with `frames` frames or more.

        Raises: UserError for latents that are no numbers, and for an autoencoder that gives fewer frames back.
        """
        _check_finite(latents, "latents")
        batch, _, rows, columns, _ = latents.shape
        latents = self._spread(latents, batch, rows, columns)
        asks = getattr(self.autoencoder, "is_decoded_to_frames", False)
        video = self.autoencoder.decode(latents, frames=frames) if asks else self.autoencoder.decode(latents)
        if video.shape[1] < frames:
            raise UserError(
                f"The autoencoder gives back {video.shape[1]} of {frames} frames (its tiles in time leave one latent "
                "frame alone, which it takes for an image): use another number of frames, or tiles of another length."
            )
        return to_bytes(video)

    def moments(self, video: Video) -> tuple[Float[Array, "B t h w Z"], Float[Array, "B t h w Z"]]:
        """Returns mean and variance of the unscaled latent; of an autoencoder without a posterior the latent and 0."""
        pixels = self._pixels(video)
        if not hasattr(self.autoencoder, "posterior"):
            latent = self.autoencoder.encode(pixels)
            return latent, jnp.zeros_like(latent)
        posterior = self.autoencoder.posterior(pixels)
        return posterior.mean, jnp.exp(posterior.logvar)

    def _pixels(self, video: Video | np.ndarray | Array) -> Float[Array, "B T H W 3"]:
        batch, frames, height, width, _ = video.shape
        try:
            _, rows, columns = self.autoencoder.latent_shape(frames, height, width)
        except ValueError as error:
            raise UserError(str(error)) from error
        placed = self._spread(video, batch, rows, columns)
        if placed.dtype == jnp.uint8:
            return to_pixels(placed)
        _check_finite(placed, "pixels")
        return placed

    def _spread(self, array: Any, batch: int, rows: int, columns: int) -> Array:
        return jax.device_put(array, video_sharding(self.mesh, batch, rows, columns))


def _check_finite(array: Array, what: str) -> None:
    """Raises: UserError naming how many values are no numbers: they would spread over all that is made of them."""
    bad = int(array.size - jnp.isfinite(array).sum())
    if bad:
        raise UserError(
            f"{bad} of {array.size} {what} are NaN or infinite: look for where they come from, or use float32."
        )
