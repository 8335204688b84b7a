"""What goldens do not say of the causal autoencoder (tests/parity has those): strides, sizes, draws and scales."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opensora_jax.models.hunyuan_vae import HunyuanVAE, HunyuanVAEConfig
from tests.models.jitted import jitted

CONFIG = HunyuanVAEConfig(3, 3, 5, (4, 8, 8), 1, 2, 4, 4, False, 1.0, 0.0)


@pytest.mark.parametrize(
    ("channels", "time", "space", "strides"),
    [
        ((128, 256, 512, 512), 4, 8, ((1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 1))),
        ((128, 256, 512, 512), 8, 8, ((2, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 1))),
        ((8, 16, 32), 4, 4, ((2, 2, 2), (2, 2, 2), (1, 1, 1))),
    ],
)
def test_levels_shrink_where_the_original_shrinks(channels, time, space, strides):
    config = HunyuanVAEConfig(3, 3, 4, channels, 1, 2, time, space, False, 1.0, 0.0)
    assert config.level_strides == strides
    assert config.strides == (time, space, space)


def test_sizes_the_autoencoder_cannot_give_back_are_refused_with_the_nearest():
    model = nnx.eval_shape(lambda: HunyuanVAE(CONFIG, rngs=nnx.Rngs(0)))
    assert model.latent_shape(9, 8, 12) == (3, 2, 3)
    with pytest.raises(ValueError, match="got 7: use 5 or 9"):
        model.latent_shape(7, 8, 8)
    with pytest.raises(ValueError, match="got 8x13: use 8x12"):
        model.latent_shape(9, 8, 13)
    for frames in (0, -3):
        with pytest.raises(ValueError, match=rf"takes 1 \+ 4 n frames: got {frames}: use 1\."):
            model.latent_shape(frames, 8, 8)
    assert [frames for frames in range(-4, 14) if model.gives_back(frames)] == [1, 5, 9, 13]


def test_encoding_refuses_what_it_would_give_back_with_other_frames():
    model = nnx.eval_shape(lambda: HunyuanVAE(CONFIG, rngs=nnx.Rngs(0)))
    for method in (model.encode, model.posterior):
        with pytest.raises(ValueError, match="got 7: use 5 or 9"):
            method(jnp.zeros((1, 7, 8, 8, 3)))


def test_a_draw_depends_on_its_key_and_scatters_around_the_mode():
    model = HunyuanVAE(CONFIG, rngs=nnx.Rngs(0))
    video = jnp.zeros((1, 5, 8, 8, 3))
    encode = jitted(model, "encode")
    mode, a, b = encode(video), *(encode(video, jax.random.split(jax.random.key(k), 1)) for k in (1, 2))
    assert not np.allclose(a, b)
    posterior = jitted(model, "posterior")(video)
    assert np.all(np.abs(a - mode) <= 6 * np.exp(0.5 * posterior.logvar))


def test_scale_and_shift_per_channel_cancel_between_encode_and_decode():
    scaled = replace(CONFIG, scale_factor=(1.0, 2.0, 3.0, 4.0, 5.0), shift_factor=(5.0, 4.0, 3.0, 2.0, 1.0))
    plain, model = (HunyuanVAE(c, rngs=nnx.Rngs(0)) for c in (CONFIG, scaled))
    video = jnp.linspace(-1, 1, 5 * 8 * 8 * 3).reshape(1, 5, 8, 8, 3)
    latent, plain_latent = jitted(model, "encode")(video), jitted(plain, "encode")(video)
    np.testing.assert_allclose(latent, (plain_latent - np.arange(5, 0, -1)) * np.arange(1, 6), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jitted(model, "decode")(latent), jitted(plain, "decode")(plain_latent), atol=1e-4)


def test_only_what_is_larger_than_a_tile_is_cut(monkeypatch):
    seen = []
    monkeypatch.setattr(HunyuanVAE, "moments", lambda _, x: seen.append(x.shape[1:4]) or jnp.zeros((1, 2, 4, 2, 10)))
    monkeypatch.setattr(
        HunyuanVAE, "reconstruct", lambda _, z: seen.append(z.shape[1:4]) or jnp.zeros((1, 5, 16, 8, 3))
    )
    model = nnx.eval_shape(
        lambda: HunyuanVAE(replace(CONFIG, use_spatial_tiling=True, sample_size=16), rngs=nnx.Rngs(0))
    )
    model.encode(jnp.zeros((1, 5, 16, 8, 3)), jax.random.split(jax.random.key(0), 1))
    model.decode(jnp.zeros((1, 2, 4, 2, 5)))
    assert seen == [(5, 16, 8), (2, 4, 2)]
    seen.clear()
    model.posterior(jnp.zeros((1, 5, 20, 8, 3)))
    model.decode(jnp.zeros((1, 2, 5, 2, 5)))
    assert seen == [(5, 16, 8), (5, 8, 8), (2, 4, 2), (2, 2, 2)]


def test_tiles_that_are_no_whole_latents_are_refused():
    replace(CONFIG, sample_size=20)
    with pytest.raises(ValueError, match=r"multiple of 16 pixels .* got 20: use 16"):
        replace(CONFIG, use_spatial_tiling=True, sample_size=20)
