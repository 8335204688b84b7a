"""The causal autoencoder against golden outputs and gradients of the original."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opensora_jax.models.hunyuan_vae import HunyuanVAE, HunyuanVAEConfig
from opensora_jax.weights.files import open_checkpoint
from opensora_jax.weights.rename import export_params, load_params

GOLDENS = Path(__file__).parents[1] / "goldens"
TOLERANCE = 1e-4  # of the largest value
GRADIENT_TOLERANCE = 1e-3


def read_golden(name):
    model = json.loads((GOLDENS / f"{name}.json").read_text())["config"]["model"]
    config = HunyuanVAEConfig(
        in_channels=model["in_channels"],
        out_channels=model["out_channels"],
        latent_channels=model["latent_channels"],
        block_out_channels=tuple(model["block_out_channels"]),
        layers_per_block=model["layers_per_block"],
        norm_num_groups=model["norm_num_groups"],
        time_compression_ratio=model.get("time_compression_ratio", 4),
        spatial_compression_ratio=model.get("spatial_compression_ratio", 8),
        mid_block_add_attention=model.get("mid_block_add_attention", True),
        scale_factor=model["scale_factor"],
        shift_factor=model["shift_factor"],
    )
    tensors = {k: np.asarray(v, np.float32) for k, v in open_checkpoint(GOLDENS / f"{name}.safetensors").items()}
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: HunyuanVAE(config, rngs=nnx.Rngs(0))))
    published = {k.removeprefix("param/"): v for k, v in tensors.items() if k.startswith("param/")}
    return graphdef, load_params("hunyuan_vae", published, shapes), tensors


def channels_last(array):
    return jnp.asarray(np.moveaxis(array, 1, -1))


def assert_close(actual, expected, tolerance=TOLERANCE):
    expected = np.moveaxis(expected, 1, -1)
    assert np.abs(np.asarray(actual) - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("name", ["hunyuan_vae_core", "hunyuan_vae_tc8_noattn"])
def test_the_autoencoder_equals_the_original_with_gradients(name):
    graphdef, params, tensors = read_golden(name)

    @jax.jit
    def encode(params, x):
        model = nnx.merge(graphdef, params)
        return model.encode(x), model.posterior(x).kl()

    @jax.jit
    def decode(params, z):
        return nnx.merge(graphdef, params).decode(z)

    @jax.jit
    @jax.grad
    def gradient(params, video):
        return jnp.mean(decode(params, encode(params, video)[0]) ** 2)

    for kind in ("image", "video"):
        latent, kl = encode(params, channels_last(tensors[f"in/{kind}"]))
        assert_close(latent, tensors[f"out/{kind}_z_mode"])
        np.testing.assert_allclose(kl, tensors[f"out/{kind}_kl"], rtol=1e-4)
    assert_close(decode(params, channels_last(tensors["in/z"])), tensors["out/decode_z"])
    assert_close(decode(params, channels_last(tensors["in/z_image"])), tensors["out/decode_z_image"])

    gradients = export_params("hunyuan_vae", gradient(params, channels_last(tensors["in/video"])))
    for key in tensors:
        if key.startswith("grad/") and "__input" not in key:
            wanted = tensors[key]
            worst = np.abs(gradients[key.removeprefix("grad/")] - wanted).max()
            assert worst <= GRADIENT_TOLERANCE * np.abs(wanted).max(), key


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


def jitted(model, method):
    graphdef, params = nnx.split(model)
    run = jax.jit(lambda params, *inputs: getattr(nnx.merge(graphdef, params), method)(*inputs))
    return lambda *inputs: run(params, *inputs)


def test_a_draw_depends_on_its_key_and_scatters_around_the_mode():
    model = HunyuanVAE(CONFIG, rngs=nnx.Rngs(0))
    video = jnp.zeros((1, 5, 8, 8, 3))
    encode = jitted(model, "encode")
    mode, a, b = encode(video), *(encode(video, jax.random.key(k)) for k in (1, 2))
    assert not np.allclose(a, b)
    posterior = jitted(model, "posterior")(video)
    assert np.all(np.abs(a - mode) <= 6 * np.exp(0.5 * posterior.logvar))


def test_scale_and_shift_per_channel_cancel_between_encode_and_decode():
    scaled = HunyuanVAEConfig(
        *list(CONFIG.__dict__.values())[:-2],
        scale_factor=(1.0, 2.0, 3.0, 4.0, 5.0),
        shift_factor=(5.0, 4.0, 3.0, 2.0, 1.0),
    )
    plain, model = (HunyuanVAE(c, rngs=nnx.Rngs(0)) for c in (CONFIG, scaled))
    video = jnp.linspace(-1, 1, 5 * 8 * 8 * 3).reshape(1, 5, 8, 8, 3)
    latent, plain_latent = jitted(model, "encode")(video), jitted(plain, "encode")(video)
    np.testing.assert_allclose(latent, (plain_latent - np.arange(5, 0, -1)) * np.arange(1, 6), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jitted(model, "decode")(latent), jitted(plain, "decode")(plain_latent), atol=1e-4)
