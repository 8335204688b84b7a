"""Bytes in, bytes out, on any mesh; sizes and values that cannot be are refused."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.config.errors import UserError
from opensora_jax.models.codec import Codec, sharding, to_bytes, to_pixels
from opensora_jax.models.posterior import Posterior
from opensora_jax.nn.tiling import Tiling
from opensora_jax.parallel.mesh import MeshConfig, make_mesh
from opensora_jax.parallel.warn import warn_once


class Halves:
    """Keeps every second pixel; its posterior has a spread of 0.1."""

    def latent_shape(self, frames, height, width):
        if height % 2 or width % 2:
            raise ValueError(f"even sizes: got {height}x{width}: use {height // 2 * 2}x{width // 2 * 2}.")
        return frames, height // 2, width // 2

    def posterior(self, video):
        mean = video[:, :, ::2, ::2]
        return Posterior(mean, jnp.full(mean.shape, 2 * np.log(0.1)))

    def encode(self, video, keys=None):
        self.sharding = video.sharding
        return self.posterior(video).latent(keys)

    def decode(self, latent):
        return jnp.repeat(jnp.repeat(latent, 2, axis=2), 2, axis=3)


def codec(data=1, fsdp=1, tensor=8):
    return Codec(Halves(), make_mesh(MeshConfig(data, fsdp, 1, tensor)))


def clips(batch, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (batch, 3, 16, 10, 3), np.uint8)


def test_bytes_become_pixels_and_bytes_again():
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 1, 16, 16, 3)
    pixels = to_pixels(jnp.asarray(every))
    np.testing.assert_allclose((pixels.min(), pixels.max()), (-1, 1), atol=1e-6)
    np.testing.assert_array_equal(to_bytes(pixels), every)
    np.testing.assert_array_equal(to_bytes(jnp.asarray([-7.0, 0.0, 7.0]).reshape(1, 1, 1, 1, 3)).ravel(), [0, 128, 255])


def test_pixels_stay_pixels_and_bytes_stay_bytes():
    video = clips(1)
    pixels = np.asarray(to_pixels(video))
    np.testing.assert_array_equal(to_pixels(pixels), pixels)
    np.testing.assert_array_equal(to_bytes(video), video)
    np.testing.assert_array_equal(to_bytes(pixels), video)


@pytest.mark.parametrize("mesh", [(1, 1, 8), (2, 2, 2), (8, 1, 1)])
def test_any_mesh_gives_the_same(mesh):
    video = clips(2)
    latents = codec(*mesh).encode(video)
    np.testing.assert_allclose(latents, video[:, :, ::2, ::2] / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(codec(*mesh).decode(latents, 3)[:, :, ::2, ::2], video[:, :, ::2, ::2])
    np.testing.assert_allclose(codec(*mesh).encode(video / np.float32(127.5) - 1), latents, atol=1e-6)


def test_the_work_is_split_over_the_devices():
    one = codec()
    one.encode(clips(1))
    assert one.autoencoder.sharding.shard_shape((1, 3, 16, 10, 3)) == (1, 3, 2, 10, 3)


class Tiled(Halves):
    """Halves with a tiling that cuts everything."""

    tiling = Tiling((1, 2, 2), True, True, False, 4, 4, 0.5)


@pytest.mark.parametrize(("batch", "said"), [(3, True), (4, False), (8, False), (16, False)])
def test_devices_that_cannot_share_tiles_out_are_announced(caplog, batch, said):
    warn_once.cache_clear()
    mesh = make_mesh(MeshConfig(8, 1, 1, 1))
    with caplog.at_level(logging.WARNING, "absl"):
        sharding(Tiled(), mesh, batch, 8, 8)
    assert ("the 8 devices go through the tiles of 3 videos together" in caplog.text) == said


def test_a_draw_depends_on_its_own_key_alone():
    video, keys = clips(3), jax.random.split(jax.random.key(0), 3)
    together, alone = codec().encode(video, keys), codec().encode(video[1:2], keys[1:2])
    np.testing.assert_allclose(together[1], alone[0], atol=1e-6)
    assert 0.05 < np.std(together - codec().encode(video)) < 0.2


def test_moments_come_from_the_posterior_where_there_is_one():
    mean, variance = codec().moments(clips(1))
    np.testing.assert_allclose(variance, 0.01, rtol=1e-5)
    plain = type("Plain", (), {name: getattr(Halves, name) for name in ("latent_shape", "decode")})
    plain.encode = lambda self, video: 7 * plain.unscaled(self, video)
    plain.unscaled = lambda self, video: video[:, :, ::2, ::2]
    latent, none = Codec(plain(), codec().mesh).moments(clips(1))
    np.testing.assert_allclose(latent, mean)
    assert not none.any()


def test_values_that_are_no_numbers_are_refused():
    video = np.zeros((1, 2, 4, 4, 3), np.float32)
    video[0, 1, 2, 3] = np.nan
    with pytest.raises(UserError, match="3 of 96 pixels are NaN or infinite"):
        codec().encode(video)
    with pytest.raises(UserError, match="96 of 96 latents are NaN"):
        codec().decode(jnp.full((1, 2, 4, 4, 3), np.nan), 2)


class Strange(Halves):
    """Makes numbers of no use of white clips, on the way back."""

    def decode(self, latent):
        white = (latent > 0.99).all((1, 2, 3, 4), keepdims=True)
        return jnp.where(white, jnp.nan, super().decode(latent))


def test_decoded_pixels_that_are_no_numbers_are_refused():
    strange = Codec(Strange(), codec().mesh)
    with pytest.raises(UserError, match="192 of 384 decoded pixels are NaN"):
        strange.decode(jnp.zeros((2, 2, 2, 4, 3)).at[1].set(1.0), 2)


def test_a_reconstruction_says_which_clips_are_numbers_and_leaves_the_others_alone():
    class Worse(Strange):
        def encode(self, video, keys=None):
            return jnp.where((video < -0.99).all((1, 2, 3, 4), keepdims=True), jnp.inf, super().encode(video, keys))

    video = clips(4)
    video[1], video[2] = 255, 0
    made, good = Codec(Worse(), codec().mesh).reconstruct(video)
    np.testing.assert_array_equal(good, [True, False, False, True])
    np.testing.assert_array_equal(made[::3], Codec(Halves(), codec().mesh).decode(codec().encode(video[::3]), 3))


def test_nothing_to_encode_or_to_decode_is_refused():
    with pytest.raises(UserError, match="got a batch of no videos"):
        codec().encode(np.zeros((0, 3, 4, 4, 3), np.uint8))
    with pytest.raises(UserError, match="got 1 latents of 0 frames"):
        codec().decode(jnp.zeros((1, 0, 2, 2, 3)), 0)
    with pytest.raises(UserError, match="got 0 latents of 3 frames"):
        codec().decode(jnp.zeros((0, 3, 2, 2, 3)), 3)
    with pytest.raises(UserError, match="3 latent frames are decoded to 3 frames: 5 were asked for"):
        codec().decode(jnp.zeros((1, 3, 2, 2, 3)), 5)


def test_sizes_that_do_not_fit_are_refused_with_some_that_do():
    with pytest.raises(UserError, match="got 5x4: use 4x4"):
        codec().encode(np.zeros((1, 2, 5, 4, 3), np.uint8))
