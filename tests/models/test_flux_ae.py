"""What goldens do not say of the autoencoder of images (tests/parity has those): frames, sizes, scales."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opensora_jax.models.flux_ae import FluxAE, FluxAEConfig
from tests.models.jitted import jitted

CONFIG = FluxAEConfig(
    resolution=8,
    in_channels=3,
    ch=32,
    out_ch=3,
    ch_mult=(1, 2),
    num_res_blocks=1,
    z_channels=5,
    scale_factor=1.0,
    shift_factor=0.0,
)


def test_no_frame_knows_another():
    model = FluxAE(CONFIG, rngs=nnx.Rngs(0))
    encode, decode = jitted(model, "encode"), jitted(model, "decode")
    video = jax.random.uniform(jax.random.key(1), (2, 3, 4, 6, 3), minval=-1)
    changed = video.at[0, 1].set(1.0)
    latents, pixels = zip(*((latent, decode(latent)) for latent in map(encode, (video, changed))), strict=True)
    for before, after in (latents, pixels):
        same = np.isclose(before, after, atol=1e-6).all((2, 3, 4))
        np.testing.assert_array_equal(same, [[True, False, True], [True, True, True]])


def test_any_number_of_frames_fits_and_other_sizes_are_refused_with_the_nearest():
    model = nnx.eval_shape(lambda: FluxAE(CONFIG, rngs=nnx.Rngs(0)))
    assert model.strides == (1, 2, 2)
    assert [model.latent_shape(frames, 8, 12) for frames in (1, 7)] == [(1, 4, 6), (7, 4, 6)]
    with pytest.raises(ValueError, match="got 8x13: use 8x12"):
        model.latent_shape(9, 8, 13)
    with pytest.raises(ValueError, match="1 frame or more: got 0: use 1"):
        model.latent_shape(0, 8, 8)
    with pytest.raises(ValueError, match="got 8x13: use 8x12"):
        model.encode(jnp.zeros((1, 2, 8, 13, 3)))
    assert not model.gives_back(0)
    assert model.gives_back(7)


def test_scale_and_shift_per_channel_cancel_between_encode_and_decode():
    scaled = replace(CONFIG, scale_factor=(1.0, 2.0, 3.0, 4.0, 5.0), shift_factor=(5.0, 4.0, 3.0, 2.0, 1.0))
    plain, model = (FluxAE(c, rngs=nnx.Rngs(0)) for c in (CONFIG, scaled))
    video = jnp.linspace(-1, 1, 3 * 4 * 6 * 3).reshape(1, 3, 4, 6, 3)
    latent, plain_latent = jitted(model, "encode")(video), jitted(plain, "encode")(video)
    np.testing.assert_allclose(latent, (plain_latent - np.arange(5, 0, -1)) * np.arange(1, 6), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jitted(model, "decode")(latent), jitted(plain, "decode")(plain_latent), atol=1e-4)


def test_a_fresh_posterior_is_narrow_and_its_divergence_is_that_of_its_frames():
    model = FluxAE(CONFIG, rngs=nnx.Rngs(0))
    video = jax.random.uniform(jax.random.key(1), (2, 3, 4, 6, 3), minval=-1)
    posterior = jitted(model, "posterior")(video)
    assert abs(posterior.logvar.mean() + 6) < 2
    assert posterior.frame_kl().shape == (2, 3)
    np.testing.assert_allclose(posterior.frame_kl().sum(1), posterior.kl(), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ch": 48}, "ch is divisible by 32: got 48"),
        ({"ch_mult": ()}, "ch_mult is at least 1: got "),
        ({"num_res_blocks": 0}, "num_res_blocks is at least 1: got 0"),
        ({"scale_factor": 0.0}, "scale_factor is finite and not 0: got 0.0"),
        ({"scale_factor": (1.0, 2.0)}, "scale_factor has one number or 5, one a channel: got 2"),
    ],
)
def test_a_config_that_no_network_has_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)
