"""What goldens do not say of Open-Sora 1.2's autoencoder (tests/parity has those): chunks, frame counts, draws."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opensora_jax.models.opensora_vae import OpenSoraVAE, OpenSoraVAEConfig, SpatialVAE, SpatialVAEConfig
from opensora_jax.models.temporal_vae import TemporalVAEConfig
from tests.models.jitted import jitted

CONFIG = OpenSoraVAEConfig(
    vae_2d=SpatialVAEConfig(3, 3, (2, 4), 1, 3, 2),
    vae_temporal=TemporalVAEConfig(3, 5, 2, 2, 1, (1, 2, 2), (True, True), 2),
    micro_frame_size=5,
    micro_batch_size=4,
    shift=(1.0, 2.0),
    scale=(3.0, 4.0),
)
VIDEO = jax.random.uniform(jax.random.key(1), (2, 11, 4, 6, 3), minval=-1)


def test_chunks_of_frames_know_nothing_of_each_other():
    moments = jitted(OpenSoraVAE(CONFIG, rngs=nnx.Rngs(0)), "moments")
    before, after = moments(VIDEO), moments(VIDEO.at[:, 5:10].set(1.0))
    same = np.isclose(before, after, atol=1e-6).all((0, 2, 3, 4))
    np.testing.assert_array_equal(same, [True, True, False, False, True])


@pytest.mark.parametrize("chunk", [None, 5, 6])
def test_every_number_of_frames_comes_back(chunk):
    model = OpenSoraVAE(replace(CONFIG, micro_frame_size=chunk), rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)

    def there_and_back(params, video):
        latent = nnx.merge(graphdef, params).encode(video)
        return latent, nnx.merge(graphdef, params).decode(latent, frames=video.shape[1])

    for frames in (1, 4, 6, 11):
        latent, back = jax.eval_shape(there_and_back, params, VIDEO[:, :frames])
        assert latent.shape[1:4] == model.latent_shape(frames, 4, 6)
        assert back.shape == (2, frames, 4, 6, 3)


def test_a_latent_alone_is_decoded_to_the_fewest_frames_and_refuses_others():
    model = nnx.eval_shape(lambda: OpenSoraVAE(CONFIG, rngs=nnx.Rngs(0)))
    assert [CONFIG.fewest_frames(t) for t in range(1, 7)] == [1, 5, 6, 10, 11, 15]
    assert [CONFIG.latent_frames(CONFIG.fewest_frames(t)) for t in range(1, 7)] == list(range(1, 7))
    with pytest.raises(ValueError, match="3 latent frames are of 6 frames or a few more: got 5"):
        model.decode(jnp.zeros((1, 3, 2, 2, 2)), frames=5)


def test_images_at_a_time_change_nothing():
    networks = [SpatialVAE(CONFIG.vae_2d, n, dtype=jnp.float32, rngs=nnx.Rngs(0)) for n in (4, None)]
    few, all_ = (jitted(network, "encode")(VIDEO) for network in networks)
    np.testing.assert_allclose(few, all_, atol=1e-5)


def test_a_draw_is_one_from_both_posteriors():
    model = OpenSoraVAE(CONFIG, rngs=nnx.Rngs(0))
    image, keys = VIDEO[:, :1], jax.random.split(jax.random.key(3), len(VIDEO))
    in_space, in_time = jax.vmap(jax.random.split, out_axes=1)(keys)
    posterior = jitted(model, "posterior")
    drawn = posterior(image, in_space)
    expected = (drawn.sample(in_time) - jnp.asarray(CONFIG.shift)) / jnp.asarray(CONFIG.scale)
    np.testing.assert_allclose(jitted(model, "encode")(image, keys), expected, atol=1e-5)
    assert not np.allclose(drawn.mean, posterior(image).mean)


def test_sizes_are_refused_with_the_nearest():
    model = nnx.eval_shape(lambda: OpenSoraVAE(CONFIG, rngs=nnx.Rngs(0)))
    assert model.strides == (4, 2, 2)
    with pytest.raises(ValueError, match="got 8x13: use 8x12"):
        model.latent_shape(9, 8, 13)
    with pytest.raises(ValueError, match="1 frame or more: got 0: use 1"):
        model.latent_shape(0, 8, 8)
    with pytest.raises(ValueError, match="got 8x13: use 8x12"):
        model.encode(jnp.zeros((1, 2, 8, 13, 3)))
    assert [frames for frames in range(4) if model.gives_back(frames)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"micro_frame_size": 0}, "micro_frame_size is at least 1, or None for all at once: got 0"),
        ({"scale": (1.0, 2.0, 3.0)}, "scale has one number or 2, one a channel: got 3"),
        ({"vae_2d": replace(CONFIG.vae_2d, latent_channels=7)}, "in_out_channels is vae_2d.latent_channels, 7: got 3"),
    ],
)
def test_a_config_that_no_network_has_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)
