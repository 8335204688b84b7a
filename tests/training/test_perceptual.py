"""LPIPS a few frames at a time, on any mesh, is LPIPS of all at once."""

import jax
import numpy as np
import pytest
from flax import nnx

from opensora_jax.config.errors import UserError
from opensora_jax.models.codec import to_pixels
from opensora_jax.models.lpips import LPIPS, LPIPSConfig
from opensora_jax.parallel.mesh import MeshConfig, make_mesh, one_device
from opensora_jax.training import perceptual
from opensora_jax.training.perceptual import FrameDistance
from opensora_jax.weights.files import save_safetensors
from opensora_jax.weights.params import published_tensors

NETWORK = LPIPS(LPIPSConfig((2, 3, 3, 5, 5)), rngs=nnx.Rngs(0))
A, B = (np.random.default_rng(i).integers(0, 256, (2, 5, 16, 18, 3), np.uint8) for i in range(2))


@pytest.mark.parametrize("mesh", [one_device(), make_mesh(MeshConfig(2, 1, 1, 4))], ids=["one", "eight"])
def test_frames_in_parts_have_the_distances_of_all_together(mesh, monkeypatch):
    seen, compiled = [], perceptual._distances
    monkeypatch.setattr(perceptual, "_distances", lambda *given: seen.append(given[2]) or compiled(*given))
    found = FrameDistance.on(NETWORK, mesh)(A, B)
    np.testing.assert_allclose(found, NETWORK(to_pixels(A), to_pixels(B)), rtol=1e-5)
    assert {video.sharding.shard_shape(video.shape)[0] for video in seen} == {perceptual.FRAMES_AT_ONCE}
    assert len(seen) == -(-10 // (perceptual.FRAMES_AT_ONCE * mesh.size))


def test_every_device_holds_the_network():
    mesh = make_mesh(MeshConfig(1, 2, 1, 4))
    for leaf in jax.tree.leaves(nnx.state(FrameDistance.on(NETWORK, mesh).lpips)):
        assert leaf.sharding.is_fully_replicated
        assert leaf.sharding.device_set == set(mesh.devices.flat)


def test_weights_of_a_file_are_the_network(tmp_path):
    leaves = ((path, leaf.get_value()) for path, leaf in nnx.to_flat_state(nnx.state(NETWORK)))
    save_safetensors(tmp_path / "lpips.safetensors", published_tensors("lpips", leaves))
    section = {"type": "lpips", "widths": (2, 3, 3, 5, 5)}
    found = FrameDistance.load(section | {"from_pretrained": str(tmp_path / "lpips.safetensors")}, one_device())
    np.testing.assert_array_equal(found(A, B), FrameDistance.on(NETWORK, one_device())(A, B))
    with pytest.raises(UserError, match=r"config\.lpips\.from_pretrained: there is no file or folder 'nowhere'"):
        FrameDistance.load(section | {"from_pretrained": "nowhere"}, one_device())
