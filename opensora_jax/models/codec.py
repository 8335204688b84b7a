"""An autoencoder at work on a mesh: bytes to latents and latents to bytes, whatever the network.

A batch is split over the devices, in space where there are fewer videos than devices, with the result of one device.
Methods run outside `jax.jit`: networks compile their own parts, and tiles, where a config asks for them, are shared out
among the devices, each of which takes whole ones.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Bool, Float, Int, Key, UInt8

from opensora_jax.config.errors import UserError
from opensora_jax.parallel.batch import to_host, video_sharding
from opensora_jax.parallel.samples import group_sharding, groups_at_once
from opensora_jax.parallel.warn import warn_once

Bytes = UInt8[Array, "B T H W 3"] | UInt8[np.ndarray, "B T H W 3"]
Pixels = Float[Array, "B T H W 3"] | Float[np.ndarray, "B T H W 3"]
Video = Bytes | Pixels  # clips come as either, by `dataset.resize`; pixels are in [-1, 1]


@jax.jit
def to_pixels(video: Video) -> Float[Array, "B T H W 3"]:
    """Returns a video's pixels, in [-1, 1]; those of bytes go from -1 to 1 exactly."""
    pixels = jnp.asarray(video, jnp.float32)
    return pixels / 127.5 - 1.0 if video.dtype == jnp.uint8 else pixels


@jax.jit
def to_bytes(video: Video) -> UInt8[Array, "B T H W 3"]:
    """Returns a video's bytes; pixels are clipped to [-1, 1] and rounded."""
    if video.dtype == jnp.uint8:
        return jnp.asarray(video)
    return jnp.floor((jnp.clip(jnp.asarray(video, jnp.float32), -1.0, 1.0) + 1.0) * 127.5 + 0.5).astype(jnp.uint8)


@dataclass(frozen=True)
class Codec:
    """An autoencoder with its parameters, and the mesh to run on."""

    autoencoder: Any
    mesh: Mesh

    def encode(self, video: Video, keys: Key[Array, "B"] | None = None) -> Array:
        """Returns scaled latents of videos.

        They are modes of the posterior, or draws from it when there is a key for each video.
        Raises: UserError for sizes that the autoencoder cannot take, and for pixels that are no numbers.
        """
        pixels = self._pixels(video)
        with self._sharing(pixels):
            return self.autoencoder.encode(pixels, keys)

    def decode(self, latents: Float[Array, "B t h w Z"], frames: int) -> UInt8[Array, "B T H W 3"]:
        """Returns the videos of scaled latents, with `frames` frames or more.

        Raises: UserError for latents or decoded pixels that are no numbers, and for fewer frames than asked for.
        """
        _check_finite(latents, "latents")
        video = self._decoded(latents, frames)
        _check_finite(video, "decoded pixels")
        return to_bytes(video)

    def reconstruct(self, video: Video) -> tuple[UInt8[Array, "B T H W 3"], Bool[np.ndarray, "B"]]:
        """Returns what decoding makes of the modes of latents, and for which videos all values were numbers."""
        latents = self.encode(video)
        good = are_finite(latents)
        decoded = self._decoded(jnp.where(good[:, None, None, None, None], latents, 0.0), video.shape[1])
        return to_bytes(decoded), np.asarray(good & are_finite(decoded))

    def moments(self, video: Video) -> tuple[Float[Array, "B t h w Z"], Float[Array, "B t h w Z"]]:
        """Returns mean and variance of the unscaled latent; of an autoencoder without a posterior the latent and 0."""
        pixels = self._pixels(video)
        with self._sharing(pixels):
            if not hasattr(self.autoencoder, "posterior"):
                latent = self.autoencoder.unscaled(pixels)
                return latent, jnp.zeros_like(latent)
            posterior = self.autoencoder.posterior(pixels)
        return posterior.mean, jnp.exp(posterior.logvar)

    def _decoded(self, latents: Float[Array, "B t h w Z"], frames: int) -> Float[Array, "B T H W 3"]:
        batch, latent_frames, rows, columns, _ = latents.shape
        if min(batch, latent_frames) < 1:
            raise UserError(f"There is nothing to decode: got {batch} latents of {latent_frames} frames.")
        latents = self._spread(latents, batch, rows, columns)
        asks = getattr(self.autoencoder, "is_decoded_to_frames", False)
        with self._sharing(latents):
            video = self.autoencoder.decode(latents, frames=frames) if asks else self.autoencoder.decode(latents)
        if video.shape[1] < frames:
            raise UserError(
                f"{latent_frames} latent frames are decoded to {video.shape[1]} frames: {frames} were asked for."
            )
        return video

    def _sharing(self, videos: Array) -> AbstractContextManager[Any]:
        """Returns the context in which tiles find the mesh; shapes, where these alone are asked for, are the same."""
        return nullcontext() if isinstance(videos, jax.core.Tracer) else jax.set_mesh(self.mesh)

    def _pixels(self, video: Video) -> Float[Array, "B T H W 3"]:
        batch, frames, height, width, _ = video.shape
        if batch < 1:
            raise UserError("There is nothing to encode: got a batch of no videos.")
        try:
            _, rows, columns = self.autoencoder.latent_shape(frames, height, width)
        except ValueError as error:
            raise UserError(str(error)) from error
        placed = self._spread(video, batch, rows, columns)
        if placed.dtype != jnp.uint8:
            _check_finite(placed, "pixels")
        return to_pixels(placed)

    def _spread(self, array: Any, batch: int, rows: int, columns: int) -> Array:
        return jax.device_put(array, sharding(self.autoencoder, self.mesh, batch, rows, columns))


def sharding(autoencoder: Any, mesh: Mesh, batch: int, rows: int, columns: int) -> NamedSharding:
    """Returns how an autoencoder takes videos whose latents have so many rows and columns: see the top of the file."""
    tiling = getattr(autoencoder, "tiling", None)
    if tiling is not None and tiling.cuts_space(rows, columns) and mesh.size > 1:
        if groups_at_once(mesh, batch) > 1:
            return group_sharding(mesh, batch)
        if batch % mesh.size:
            warn_once(
                "the %d devices go through the tiles of %d videos together, one after the other: with a number of "
                "videos that divides the devices each takes tiles of its own",
                *(mesh.size, batch),
            )
    return video_sharding(mesh, batch, rows, columns)


@jax.jit
def are_finite(batch: Float[Array, "B ..."]) -> Bool[Array, "B"]:
    """Returns for each sample of a batch whether all its values are numbers."""
    return jnp.isfinite(batch).all(range(1, batch.ndim))  # a reshape would gather what is split in space


@jax.jit
def _bad_values(array: Float[Array, "B T ..."]) -> Int[Array, "B T"]:
    """Returns how many values of each frame are no numbers; those of a whole batch could be more than 32 bits count."""
    return (~jnp.isfinite(array)).sum(range(2, array.ndim))


def _check_finite(array: Float[Array, "B T ..."], what: str) -> None:
    """Raises: UserError naming how many values are no numbers: they would spread over all that is made of them."""
    if bad := int(to_host(_bad_values(array)).sum()):
        raise UserError(
            f"{bad} of {array.size} {what} are NaN or infinite: look for where they come from, or use float32."
        )
