"""Resampling without parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.nn.pixel_shuffle import Averaging, Duplicating, grow_nearest, pixel_shuffle, pixel_unshuffle

CLIP = jax.random.normal(jax.random.key(0), (1, 4, 6, 10, 3))


def test_shuffling_undoes_unshuffling():
    channels = pixel_unshuffle(CLIP, (2, 3, 5))
    assert channels.shape == (1, 2, 2, 2, 90)
    np.testing.assert_array_equal(pixel_shuffle(channels, (2, 3, 5)), CLIP)


def test_the_pixels_of_a_channel_lie_together_frames_first():
    x = jnp.arange(16.0).reshape(1, 2, 2, 2, 2)  # channel fastest
    assert pixel_unshuffle(x, (2, 2, 2)).ravel().tolist() == [*range(0, 16, 2), *range(1, 16, 2)]


@pytest.mark.parametrize(("in_time", "frames"), [(True, 4), (False, 4), (True, 1)])
def test_averaging_undoes_duplicating(in_time, frames):
    x = jax.random.normal(jax.random.key(1), (1, frames, 3, 5, 8))
    grown = Duplicating(4, 2, in_time)(x)
    assert grown.shape == (1, 8 if in_time and frames > 1 else frames, 6, 10, 4)
    np.testing.assert_allclose(Averaging(8, 2, in_time)(grown), x, atol=1e-6)


def test_nearest_growth_repeats_every_position():
    grown = grow_nearest(CLIP, (2, 1, 3))
    assert grown.shape == (1, 8, 6, 30, 3)
    np.testing.assert_array_equal(grown[:, 5, :, 16], CLIP[:, 2, :, 5])
