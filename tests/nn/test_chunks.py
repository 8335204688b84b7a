"""Functions of chunks are applied to each and joined; images are the same few or many at a time, on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.nn.chunks import cut, in_chunks, of_images
from opensora_jax.parallel.batch import batch_sharding
from opensora_jax.parallel.mesh import MeshConfig, make_mesh


@pytest.mark.parametrize("size", [None, 2, 3, 7, 8])
def test_a_function_of_chunks_is_applied_to_each_and_joined(size):
    x = jnp.arange(2 * 7 * 3.0).reshape(2, 7, 3)

    def doubled(chunk):
        return jnp.repeat(chunk, 2, axis=1) + chunk.sum(1, keepdims=True)

    steps = range(0, 7, size or 7)
    expected = jnp.concatenate([doubled(x[:, i : i + (size or 7)]) for i in steps], axis=1)
    np.testing.assert_array_equal(in_chunks(doubled, x, size, axis=1), expected)


@pytest.mark.parametrize("size", [None, 2, 3, 7, 8])
def test_chunks_are_cut_in_order(size):
    x = jnp.arange(2 * 7 * 3.0).reshape(2, 7, 3)
    parts = list(cut(x, size, axis=1))
    assert [part.shape[1] for part in parts] == [min(size or 7, 7 - i) for i in range(0, 7, size or 7)]
    np.testing.assert_array_equal(jnp.concatenate(parts, axis=1), x)


def halved(images):
    assert images.ndim == 4
    return images[:, ::2, ::2, :1] - images.mean((1, 2, 3), keepdims=True)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("images", [None, 1, 2, 4, 7, 100])
def test_images_at_a_time_change_nothing(batch, images):
    video = jax.random.normal(jax.random.key(0), (batch, 5, 4, 6, 2))
    expected = jnp.stack([halved(clip) for clip in video])
    np.testing.assert_allclose(of_images(halved, video, images), expected, atol=1e-6)


def test_videos_that_devices_share_stay_where_they_are():
    mesh = make_mesh(MeshConfig(8, 1, 1, 1))
    video = jax.random.normal(jax.random.key(0), (8, 5, 4, 6, 2))
    placed = jax.device_put(video, batch_sharding(mesh))
    run = jax.jit(lambda video: of_images(halved, video, 2)).lower(placed).compile()
    np.testing.assert_allclose(run(placed), of_images(halved, video, 2), atol=1e-6)
    assert not any(word in run.as_text() for word in ("all-gather", "all-to-all", "collective-permute"))
