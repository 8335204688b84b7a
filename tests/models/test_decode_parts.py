"""Frames that leave one part after the other are those of a decode as a whole, in fewer bytes at a time."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from opensora_jax.models import flux_ae
from opensora_jax.weights.pretrained import AUTOENCODERS as MODULES
from tests.models.tiny import AUTOENCODERS

TILED = {"use_temporal_tiling": True, "tile_overlap_factor": 0.5}
CASES = {  # kind: (changes of the config, latent frames, arguments, frames of each part)
    "hunyuan_vae": (TILED | {"sample_tsize": 8}, 4, {}, [5, 4, 4]),
    "dc_ae": (TILED | {"temporal_tile_size": 4}, 5, {}, [2, 2, 2, 2, 1]),
    "flux_ae": ({}, 5, {}, [2, 2, 1]),
    "opensora_vae": ({}, 3, {"frames": 10}, [4, 4, 2]),
}


@pytest.mark.parametrize("kind", CASES)
def test_parts_are_the_decode_in_order(monkeypatch, kind):
    changes, frames, arguments, sizes = CASES[kind]
    monkeypatch.setattr(flux_ae, "PIXELS_AT_ONCE", 2 * 2 * 8 * 12)
    model = MODULES[kind][1](replace(AUTOENCODERS[kind], **changes), rngs=nnx.Rngs(0))
    rows, columns = (4, 6) if kind == "flux_ae" else (2, 3)
    batch = 2 if kind == "flux_ae" else 1
    latent = jax.random.normal(jax.random.key(0), (batch, frames, rows, columns, model.latent_channels))
    parts = list(model.decode_parts(latent, **arguments))
    assert [part.shape[1] for part in parts] == sizes
    whole = model.decode(latent, **arguments)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-5 * float(abs(whole).max()))


@pytest.mark.parametrize("images", [1, 2, 4, 100])
def test_a_few_images_at_a_time_are_all_of_them(monkeypatch, images):
    monkeypatch.setattr(flux_ae, "PIXELS_AT_ONCE", images * 4 * 6)
    model = flux_ae.FluxAE(AUTOENCODERS["flux_ae"], rngs=nnx.Rngs(0))
    jax.clear_caches()  # the number is a constant of the program
    video = jax.random.uniform(jax.random.key(1), (2, 5, 4, 6, 3), minval=-1)
    latent = model.encode(video)
    pixels = model.decode(latent)
    for i in range(video.shape[1]):
        np.testing.assert_allclose(latent[:, i : i + 1], model.encode(video[:, i : i + 1]), atol=1e-5)
        np.testing.assert_allclose(pixels[:, i : i + 1], model.decode(latent[:, i : i + 1]), atol=1e-5)
