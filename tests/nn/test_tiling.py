"""Tiles of a network that knows no neighbours add up to the whole; how they are blended, and which tiles there are."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import reduce

from opensora_jax.nn.tiling import Tiling, tiled_decode, tiled_encode
from opensora_jax.parallel.mesh import MeshConfig, make_mesh

K, S = 2, 3  # strides
TILING = Tiling(
    (K, S, S),
    is_causal=True,
    use_spatial_tiling=True,
    use_temporal_tiling=True,
    spatial_tile_size=4 * S,
    temporal_tile_size=8 * K,
    tile_overlap_factor=0.25,
)
BOTH = pytest.mark.parametrize("causal", [True, False])


def encoder(causal):
    """Returns block means, the first frame alone where causal."""

    def encode(video):
        space = reduce(np.asarray(video), "B T (h s) (w r) C -> B T h w C", "mean", s=S, r=S)
        rest = reduce(space[:, causal:], "B (t k) h w C -> B t h w C", "mean", k=K)
        return jnp.asarray(np.concatenate([space[:, :causal], rest], 1))

    return encode


def decoder(causal):
    """Returns every latent repeated over its block, the first one only in space where causal."""

    def decode(latent):
        frames = np.asarray(latent).repeat(K, axis=1)[:, (K - 1) * causal :]
        return jnp.asarray(frames.repeat(S, axis=2).repeat(S, axis=3))

    return decode


def random(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


@BOTH
@pytest.mark.parametrize("size", [(3, 7, 4), (13, 5, 11), (17, 3, 4)])
def test_tiles_of_a_network_without_context_add_up_to_the_whole(causal, size):
    tiling, (t, h, w) = replace(TILING, is_causal=causal), size
    video = random(2, causal + K * (t - causal), h * S, w * S, 2)
    np.testing.assert_allclose(tiled_encode(tiling, video, encoder(causal)), encoder(causal)(video), atol=1e-5)
    latent = random(2, t, h, w, 5)
    np.testing.assert_allclose(tiled_decode(tiling, latent, decoder(causal)), decoder(causal)(latent), atol=1e-5)


def seen(run, tiling, array, of_tile):
    """Returns the (frames, rows, columns) of every tile."""
    shapes = []
    run(tiling, array, lambda tile: shapes.append(tile.shape[1:4]) or of_tile(tile))
    return shapes


def test_what_is_no_larger_than_a_tile_is_one_tile():
    assert seen(tiled_encode, TILING, random(1, 15, 12, 12, 1), encoder(True)) == [(15, 12, 12)]
    assert seen(tiled_decode, TILING, random(1, 8, 4, 4, 1), decoder(True)) == [(8, 4, 4)]


def test_tiles_overlap_and_shrink_at_the_border():
    space = replace(TILING, use_temporal_tiling=False)
    tiles = seen(tiled_encode, space, random(1, 33, 15, 24, 1), encoder(True))
    assert tiles == [(33, rows, columns) for rows in (12, 6) for columns in (12, 12, 6)]
    time = replace(TILING, use_spatial_tiling=False)
    assert seen(tiled_decode, time, random(1, 17, 5, 7, 1), decoder(True)) == [(9, 5, 7), (9, 5, 7), (5, 5, 7)]


@pytest.mark.parametrize(("batch", "runs"), [(1, 5), (2, 6), (3, 16)])
def test_devices_take_equal_tiles_at_once(batch, runs):
    """Of 3 x 3 whole tiles, 3 short ones, 3 narrow ones and 1 that is both; 8 devices do not divide by 3 videos."""
    tiling, latent = replace(TILING, use_temporal_tiling=False), random(batch, 3, 11, 11, 2)
    shapes = []

    def decode(tiles, *, each_alone=False):
        assert each_alone == (batch < 3)
        shapes.append(tiles.shape)
        return decoder(True)(tiles)

    with jax.set_mesh(make_mesh(MeshConfig(2, 1, 2, 2))):
        found = tiled_decode(tiling, latent, decode)
    np.testing.assert_array_equal(found, tiled_decode(tiling, latent, decoder(True)))
    assert len(shapes) == runs
    assert {shape[0] for shape in shapes} == ({8} if batch < 3 else {3})


def test_a_causal_tile_whose_only_frame_would_be_dropped_is_not_computed():
    time = replace(TILING, use_spatial_tiling=False)
    assert seen(tiled_decode, time, random(1, 13, 1, 1, 1), decoder(True)) == [(9, 1, 1), (7, 1, 1)]


def numbered(*numbers):
    """Returns what gives tiles of one number each, in their order."""
    left = iter(numbers)
    return lambda tile: jnp.full(tile.shape, next(left))


def test_the_share_of_a_tile_grows_from_nothing_over_the_overlap():
    tiling = replace(TILING, strides=(1, 1, 1), use_spatial_tiling=False, temporal_tile_size=16)
    tiled = tiled_encode(tiling, random(1, 18, 1, 1, 1), numbered(0.0, 1.0))
    np.testing.assert_allclose(tiled.ravel(), [0.0] * 13 + [0, 1 / 4, 2 / 4, 3 / 4, 1])


def test_neighbours_are_blended_before_they_are_blended_in_the_one_above_first():
    tiling = replace(TILING, strides=(1, 1, 1), use_temporal_tiling=False, spatial_tile_size=4, tile_overlap_factor=0.5)
    tiled = tiled_encode(tiling, random(1, 1, 5, 5, 1), numbered(8.0, 16.0, 0.0, 32.0, 64.0, 0.0, 0.0, 0.0, 0.0))
    above, left = (8 + 16) / 2, (8 + 32) / 2  # at row and column 3, where all shares are a half
    assert tiled[0, 0, 3, 3, 0] == left / 2 + (above / 2 + 64 / 2) / 2


@BOTH
def test_inside_jit_the_loop_is_unrolled_to_the_same(causal):
    tiling, z = replace(TILING, strides=(1, 1, 1), is_causal=causal), random(1, 11, 5, 13, 1)
    decode = partial(tiled_decode, tiling, decode_tile=lambda tile: tile - tile.mean())
    np.testing.assert_allclose(jax.jit(decode)(z), decode(z), atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tile_overlap_factor": 1.0}, "from 0 to 0.99: got 1.0"),
        ({"spatial_tile_size": 20}, "multiple of 12 pixels .* got 20: use 24"),
        ({"temporal_tile_size": 3}, "multiple of 8 frames .* got 3: use 8"),
    ],
)
def test_tiles_that_would_not_add_up_are_refused_with_the_nearest(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(TILING, **fields)


def test_sizes_of_tiling_that_is_not_used_are_not_looked_at():
    replace(TILING, use_spatial_tiling=False, use_temporal_tiling=False, spatial_tile_size=1, temporal_tile_size=1)
