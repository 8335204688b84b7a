"""Every autoencoder split over devices gives what one device gives, and no activation is ever gathered."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opensora_jax.models.codec import Codec
from opensora_jax.nn import convolve, frame_attention, winograd
from opensora_jax.parallel.batch import video_sharding
from opensora_jax.parallel.mesh import MeshConfig, make_mesh, one_device
from opensora_jax.weights.pretrained import AUTOENCODERS as MODULES
from tests.collectives import gathered
from tests.models.tiny import AUTOENCODERS

WIDE = "hunyuan_vae of 64 channels"
CONFIGS = AUTOENCODERS | {WIDE: replace(AUTOENCODERS["hunyuan_vae"], block_out_channels=(64, 64, 64))}
TOKEN_CHANNELS = {"hunyuan_vae": 8, WIDE: 64, "flux_ae": 64, "dc_ae": 0, "opensora_vae": 4}  # where all see all
FRAMES = {"hunyuan_vae": 5, WIDE: 5, "flux_ae": 3, "dc_ae": 4, "opensora_vae": 6}
MESHES = {"in space": ((1, 2, 1, 4), (1, 8, 3)), "over videos and in space": ((2, 1, 2, 2), (2, 3, 4))}


def module_of(kind):
    return MODULES[kind.split()[0]][1]


@pytest.fixture
def fast_forms(monkeypatch):
    """Small inputs go by the forms of large ones, in parts and by tiles, where one device does the work."""
    monkeypatch.setattr(winograd, "POSITIONS", 1)
    monkeypatch.setattr(convolve, "LARGEST_PART", 1000)


def close(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.usefixtures("fast_forms")
@pytest.mark.parametrize("split", MESHES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_split_autoencoder_gives_what_one_device_gives(kind, split):
    axes, (batch, rows, columns) = MESHES[split]
    model = module_of(kind)(CONFIGS[kind], rngs=nnx.Rngs(0))
    size = (FRAMES[kind], rows * model.strides[1], columns * model.strides[2])
    video = np.asarray(jax.random.uniform(jax.random.key(0), (batch, *size, 3), minval=-1))
    keys = jax.random.split(jax.random.key(1), batch)
    alone, together = Codec(model, one_device()), Codec(model, make_mesh(MeshConfig(*axes)))
    sharding = video_sharding(together.mesh, batch, rows, columns)
    latents = alone.encode(video)
    for given, expected in ((None, latents), (keys, alone.encode(video, keys))):
        found = together.encode(video, given)
        assert found.sharding.shard_shape(found.shape) == sharding.shard_shape(latents.shape)
        close(found, expected)
    found, expected = together.decode(latents, size[0]), alone.decode(latents, size[0])
    assert found.sharding.shard_shape(found.shape) == sharding.shard_shape(expected.shape)
    assert np.abs(np.asarray(found, int) - np.asarray(expected, int)).max() <= 1  # bytes, which may round either way
    close(model.decode(jax.device_put(latents, sharding)), model.decode(latents))


@pytest.mark.usefixtures("fast_forms")
@pytest.mark.parametrize(("kind", "batch"), [("hunyuan_vae", 1), ("dc_ae", 2)])
def test_devices_that_take_a_tile_each_give_what_one_device_gives(kind, batch):
    tile = 4 * CONFIGS[kind].tiling.strides[1]
    size = {"sample_size": tile} if kind == "hunyuan_vae" else {"spatial_tile_size": tile}
    config = replace(CONFIGS[kind], use_spatial_tiling=True, **size)
    model = module_of(kind)(config, rngs=nnx.Rngs(0))
    rows, columns = (side * model.strides[1] for side in (6, 4))
    video = np.asarray(jax.random.uniform(jax.random.key(0), (batch, FRAMES[kind], rows, columns, 3), minval=-1))
    alone, together = Codec(model, one_device()), Codec(model, make_mesh(MeshConfig(2, 1, 2, 2)))
    latents = alone.encode(video)
    for keys in (None, jax.random.split(jax.random.key(1), batch)):
        found = together.encode(video, keys)
        assert len({str(shard.index) for shard in found.addressable_shards}) == batch  # a part of a video nowhere
        close(found, alone.encode(video, keys))
    found, expected = (codec.decode(latents, FRAMES[kind]) for codec in (together, alone))
    assert np.abs(np.asarray(found, int) - np.asarray(expected, int)).max() <= 1


def test_tiles_of_a_device_each_need_no_other_device():
    graph, params = nnx.split(nnx.eval_shape(lambda: module_of(WIDE)(CONFIGS[WIDE], rngs=nnx.Rngs(0))))
    with jax.set_mesh(make_mesh(MeshConfig(2, 1, 2, 2))):
        run = jax.jit(lambda params, z: nnx.merge(graph, params).reconstruct(z, each_alone=True))
        text = run.lower(params, jax.ShapeDtypeStruct((8, 2, 4, 4, 2), jnp.float32)).compile().as_text()
    assert not re.search("all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter", text)


@pytest.mark.usefixtures("fast_forms")
@pytest.mark.parametrize("split", MESHES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_nothing_but_keys_and_values_is_gathered(monkeypatch, kind, split):
    axes, (batch, rows, columns) = MESHES[split]
    monkeypatch.setattr(frame_attention, "LARGEST", 1)
    sharding = video_sharding(make_mesh(MeshConfig(*axes)), batch, rows, columns)
    graph, params = nnx.split(nnx.eval_shape(lambda: module_of(kind)(CONFIGS[kind], rngs=nnx.Rngs(0))))
    model = nnx.merge(graph, params)
    size = (FRAMES[kind], rows * model.strides[1], columns * model.strides[2])
    latent = (*model.latent_shape(*size), model.latent_channels)
    tokens = batch * latent[0] * rows * columns * TOKEN_CHANNELS[kind]
    for method, shape in (("encode", (*size, 3)), ("decode", latent)):
        run = jax.jit(lambda params, x, method=method: getattr(nnx.merge(graph, params), method)(x))
        compiled = run.lower(params, jax.ShapeDtypeStruct((batch, *shape), jnp.float32, sharding=sharding)).compile()
        assert max(gathered(compiled.as_text()), default=0) <= tokens, method
