"""The two published files of LPIPS as one state dict. They are given as safetensors: the reader tells by suffix."""

import numpy as np
import pytest
from flax import nnx

from opensora_jax.config.errors import UserError
from opensora_jax.models.lpips import LPIPS, LPIPSConfig
from opensora_jax.weights import lpips_files
from opensora_jax.weights.files import save_safetensors
from opensora_jax.weights.params import load_params
from opensora_jax.weights.pretrained import open_weights
from opensora_jax.weights.rename import published_shapes

CONFIG = LPIPSConfig((2, 3, 4, 5, 6))


def test_a_folder_with_both_files_is_a_complete_model(tmp_path, monkeypatch):
    monkeypatch.setattr(lpips_files, "LINEAR", "vgg.safetensors")
    monkeypatch.setattr(lpips_files, "VGG", "vgg16*.safetensors")
    state = nnx.state(nnx.eval_shape(lambda: LPIPS(CONFIG, rngs=nnx.Rngs(0))))
    draw = np.random.default_rng(0).standard_normal
    weights = {key: draw(shape).astype(np.float32) for key, shape in published_shapes("lpips", state).items()}
    linear = {key: value for key, value in weights.items() if key.startswith("lin")}
    network = {"features." + key.split(".", 2)[2]: weights[key] for key in weights.keys() - linear.keys()}
    save_safetensors(tmp_path / "vgg.safetensors", linear)
    with pytest.raises(UserError, match=r"0 files .*put torchvision's"):
        open_weights(tmp_path)
    save_safetensors(tmp_path / "vgg16-1.safetensors", network | {"classifier.0.bias": np.zeros(3, np.float32)})
    found = open_weights(tmp_path)
    assert found.keys() == weights.keys()
    loaded = load_params("lpips", found, state)
    kernel = loaded["net"]["slice3"]["12"]["kernel"][...]
    np.testing.assert_array_equal(kernel, weights["net.slice3.12.weight"].transpose(2, 3, 1, 0)[...])
