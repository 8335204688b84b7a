"""What goldens do not say of the DC-AE (tests/parity has those): sizes, names, scales, and networks for images."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.diffusion.inference import high_compression
from opensora_jax.models.dc_ae import DCAE
from opensora_jax.models.dc_ae_config import DCAEConfig, DecoderConfig, EncoderConfig
from opensora_jax.models.sizes import check_gives_back
from opensora_jax.weights.pretrained import AUTOENCODERS, parse_model

BLOCKS = ("ResBlock", ("EViT_GLU",), "ResBlock")
VIDEO = DCAEConfig(
    None,
    latent_channels=4,
    time_compression_ratio=2,
    spatial_compression_ratio=4,
    encoder=EncoderConfig(
        (8, 32, 8), (1, 1, 1), BLOCKS, "rms3d", "silu", True, "Conv", temporal_downsample=(True, False, False)
    ),
    decoder=DecoderConfig(
        *((8, 32, 8), (1, 1, 1), BLOCKS, "rms3d", "silu", True),
        upsample_block_type="InterpolateConv",
        out_norm="rms3d",
        temporal_upsample=(True, False, False),
    ),
)
IMAGE = DCAEConfig(
    None,
    latent_channels=4,
    spatial_compression_ratio=2,
    encoder=EncoderConfig((8, 32), (1, 1), ("ResBlock", "EViTS5_GLU")),
    decoder=DecoderConfig((8, 32), (1, 1), ("ResBlock", "EViTS5_GLU"), ("ln2d", "rms2d")),
)


def clip(frames, height, width):
    return jax.random.uniform(jax.random.key(0), (1, frames, height, width, 3), minval=-1.0)


def test_the_published_name_stands_for_the_published_network():
    config = high_compression.get_config()
    module, network = parse_model(config.ae.to_dict(), AUTOENCODERS, "config.ae")
    assert module is DCAE
    assert (network.strides, network.latent_channels) == ((4, 32, 32), 128)
    assert (network.use_spatial_tiling, network.spatial_tile_size) == (True, 256)
    assert replace(network, scaling_factor=0.493).scaling_factor == 0.493


def test_sizes_the_autoencoder_cannot_take_are_refused_with_the_nearest():
    model = nnx.eval_shape(lambda: DCAE(DCAEConfig("dc-ae-f32t4c128"), rngs=nnx.Rngs(0)))
    assert model.latent_shape(32, 64, 96) == (8, 2, 3)
    assert model.latent_shape(1, 32, 32) == (1, 1, 1)
    for frames, near in ((0, "1"), (-3, "1"), (3, "1 or 4"), (7, "4 or 8"), (33, "32 or 36")):
        with pytest.raises(ValueError, match=f"got {frames}: use {near}"):
            model.latent_shape(frames, 32, 32)
    with pytest.raises(ValueError, match="got 40x100: use 32x96"):
        model.latent_shape(4, 40, 100)
    encoded = nnx.eval_shape(lambda model, video: model.encode(video), model, jnp.zeros((1, 4, 64, 64, 3)))
    assert encoded.shape == (1, 1, 2, 2, 128)  # the last tile of 52 frames, say
    with pytest.raises(ValueError, match="got 6: use 4 or 8"):
        jax.eval_shape(lambda x: model.encode(x), clip(6, 32, 32))


def test_shapes_go_there_and_back_but_one_latent_frame_is_an_image():
    def there_and_back(video):
        model = DCAE(VIDEO, rngs=nnx.Rngs(0))
        latent = model.encode(video)
        assert latent.shape == (1, *model.latent_shape(*video.shape[1:4]), 4)
        return latent, model.decode(latent)

    for frames, latents, back in ((1, 1, 1), (2, 1, 1), (4, 2, 4), (6, 3, 6)):
        latent, video = jax.eval_shape(there_and_back, clip(frames, 8, 12))
        assert latent.shape == (1, latents, 2, 3, 4)
        assert video.shape == (1, back, 8, 12, 3)


def test_frames_that_decoding_does_not_give_back_are_refused_with_the_nearest_that_it_does():
    def gives_back(**tiles):
        config = DCAEConfig("dc-ae-f32t4c128", temporal_tile_size=32, tile_overlap_factor=0.25, **tiles)
        return nnx.eval_shape(lambda: DCAE(config, rngs=nnx.Rngs(0)))

    for tiles, refused in (({}, {4}), ({"use_temporal_tiling": True}, {4, 52, 76, 100})):
        model = gives_back(**tiles)
        assert {frames for frames in range(4, 124, 4) if not model.gives_back(frames)} == refused
        with pytest.raises(ValueError, match="as an image, so it gives back fewer than 4 frames: use 1 or 8"):
            check_gives_back(model, 4)
    with pytest.raises(ValueError, match="fewer than 52 frames: use 48 or 56"):
        check_gives_back(model, 52)
    check_gives_back(model, 1)
    assert not model.gives_back(6)


def test_what_it_says_of_frames_is_what_decoding_gives():
    config = replace(VIDEO, use_temporal_tiling=True, temporal_tile_size=8)
    model = nnx.eval_shape(lambda: DCAE(config, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(model)

    def there_and_back(params, video):
        model = nnx.merge(graph, params)
        return model.decode(model.encode(video))

    for frames in (1, 2, 4, 8, 10, 14, 16):
        back = jax.eval_shape(there_and_back, params, clip(frames, 4, 4)).shape[1]
        assert (back == frames) == model.gives_back(frames), frames


def test_the_scaling_factor_divides_latents_and_cancels_in_decoding():
    plain, scaled = (DCAE(replace(VIDEO, scaling_factor=f), rngs=nnx.Rngs(0)) for f in (None, 0.5))
    video = clip(4, 4, 8)
    latent = plain.encode(video)
    np.testing.assert_allclose(scaled.encode(video), 2 * latent, rtol=1e-5)
    np.testing.assert_allclose(scaled.project(video), latent, rtol=1e-5)
    np.testing.assert_allclose(scaled.decode(2 * latent), plain.decode(latent), rtol=1e-4, atol=1e-5)


def test_an_image_network_sees_every_frame_alone():
    model = DCAE(IMAGE, rngs=nnx.Rngs(0))
    video = clip(3, 6, 10)
    latent = model.encode(video)
    apart = [model.encode(video[:, t : t + 1]) for t in range(3)]
    np.testing.assert_allclose(latent, jnp.concatenate(apart, 1), atol=1e-5)
    assert model.decode(latent).shape == video.shape


def test_gradients_reach_every_parameter():
    graph, params = nnx.split(DCAE(VIDEO, rngs=nnx.Rngs(0)))
    video = clip(4, 8, 8)

    @jax.jit
    def gradients(params):
        def loss(params):
            model = nnx.merge(graph, params)
            return jnp.mean((model.reconstruct(model.project(video)) - video) ** 2)

        return jax.grad(loss)(params)

    for path, gradient in nnx.to_flat_state(gradients(params)):
        assert np.abs(gradient.get_value()).max() > 0, path


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_name": "dc-ae"}, "model_name is one of dc-ae-f32t4c128"),
        ({"model_name": "dc-ae-f32t4c128", "latent_channels": 64}, "has its own latent_channels"),
        ({"model_name": "dc-ae-f32t4c128", "from_scratch": False}, "name them in from_pretrained"),
        ({"model_name": None, "scaling_factor": 0.0}, "scaling_factor is above 0"),
        ({"model_name": None, "spatial_compression_ratio": 16}, "do not make"),
        ({"model_name": None, "latent_channels": 24}, "latent_channels divide"),
    ],
)
def test_networks_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DCAEConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth_list": (1, 1)}, "one entry a stage"),
        ({"width_list": (4, 8), "depth_list": (1, 0)}, "1 block or more"),
        ({"width_list": (8,), "depth_list": (1,), "block_type": "EViT_GLU"}, "width of 32 or more: got 8"),
        ({"is_video": True, "norm": "rms3d"}, "got ConvPixelUnshuffle"),
        ({"is_video": True, "downsample_block_type": "Conv"}, "got rms2d"),
        ({"norm": "rms3d"}, "is_video=False goes with"),
        ({"width_list": (4, 24), "depth_list": (1, 1)}, "divides 4 x 4: got 24"),
    ],
)
def test_stages_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        EncoderConfig(**fields)
