from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opensora_jax.config.errors import UserError
from opensora_jax.diffusion import sampler
from opensora_jax.inference import outputs
from opensora_jax.inference.pipeline import Pipeline, draw_noise, trim
from opensora_jax.inference.request import Request, SamplingOption
from opensora_jax.nn.tiling import Tiling, tiled_decode
from opensora_jax.parallel.mesh import one_device
from tests.inference.fakes import Autoencoder, encode_text

OPTION = SamplingOption(
    resolution=None,
    aspect_ratio=None,
    height=8,
    width=12,
    num_frames=9,
    num_steps=3,
    shift=True,
    flow_shift=None,
    guidance=3.0,
    guidance_img=2.0,
    text_osci=False,
    image_osci=False,
    scale_temporal_osci=False,
    method="i2v",
    seed=0,
)


@dataclass(frozen=True)
class Config:
    patch_size: int = 1
    cond_embed: bool = True
    guidance_embed: bool = False


class Denoiser(nnx.Module):
    """A velocity that depends on every input."""

    def __init__(self):
        self.config = Config()
        self.gain = nnx.Param(jnp.float32(0.5))

    def __call__(self, x, t, text, pooled, condition, guidance):
        shift = (text.sum((1, 2)) + pooled.sum(1) + t)[:, None, None, None, None]
        return self.gain[...] * jnp.sin(x + shift) + 0.1 * condition.sum(-1, keepdims=True)


def make_pipeline(batch_size, decode_batch_size=2):
    mesh = one_device()
    return Pipeline(Denoiser(), Autoencoder(), encode_text, mesh, batch_size, decode_batch_size)


REQUESTS = [Request(f"prompt {i}", index=i, seed=0) for i in range(5)]


def test_a_video_does_not_depend_on_the_batch_it_runs_in():
    small = dict(make_pipeline(2)(REQUESTS, OPTION, "t2v"))
    large = dict(make_pipeline(3, decode_batch_size=3)(REQUESTS, OPTION, "t2v"))
    assert list(small) == list(large) == REQUESTS
    for request in REQUESTS:
        assert small[request].shape == (9, 8, 12, 3)
        assert small[request].dtype == np.uint8
        np.testing.assert_allclose(small[request].astype(int), large[request], atol=1)
    assert (small[REQUESTS[0]] != small[REQUESTS[1]]).any()


def test_a_part_of_the_requests_gives_the_same_videos():
    whole = dict(make_pipeline(2)(REQUESTS, OPTION, "t2v"))
    ((_, alone),) = make_pipeline(2)(REQUESTS[3:4], OPTION, "t2v")
    np.testing.assert_allclose(alone.astype(int), whole[REQUESTS[3]], atol=1)


def test_a_second_call_compiles_nothing():
    pipeline = make_pipeline(2)
    list(pipeline(REQUESTS[:2], OPTION, "t2v"))
    compiled = sampler._euler._cache_size()
    list(pipeline(REQUESTS[2:4], OPTION, "t2v"))
    assert sampler._euler._cache_size() == compiled


def test_noise_follows_seed_and_index():
    noise = draw_noise([*REQUESTS[:2], replace(REQUESTS[0], seed=1), REQUESTS[0]], (3, 2, 3), 5)
    assert noise.shape == (4, 3, 2, 3, 5)
    assert (noise[0] == noise[3]).all()
    assert (noise[0] != noise[1]).all()
    assert (noise[0] != noise[2]).all()


def test_the_given_image_is_the_first_frame_of_every_video(tmp_path):
    image = np.random.default_rng(0).integers(40, 200, (1, 2, 3, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    record = outputs.save(tmp_path, "image", image, 8.0, {"key": ""})
    requests = [replace(request, references=(tmp_path / record["file"],)) for request in REQUESTS[:3]]
    for _, video in make_pipeline(2)(requests, OPTION, "i2v_head"):
        np.testing.assert_allclose(video[0].astype(int), image[0], atol=2)


def test_references_of_a_batch_are_encoded_together_each_in_its_place(tmp_path):
    images = np.random.default_rng(0).integers(40, 200, (5, 1, 2, 3, 3), np.uint8).repeat(4, 2).repeat(4, 3)
    for i, image in enumerate(images):
        outputs.save(tmp_path, f"{i}", image, 8.0, {"key": ""})
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    batch = [replace(REQUESTS[i], references=(paths[i], paths[i - 1])) for i in (0, 3, 4, 4)]
    pipeline = make_pipeline(4)
    latents = pipeline._references(batch, OPTION, "i2v_loop")
    pixels = images.astype(np.float32) / 127.5 - 1
    for i, (head, tail) in zip((0, 3, 4, 4), latents, strict=True):
        np.testing.assert_allclose(head, pixels[i, :, ::4, ::4], atol=0.01)
        np.testing.assert_allclose(tail, pixels[i - 1, :, ::4, ::4], atol=0.01)
    assert pipeline._references(batch, OPTION, "t2v") == [[], [], [], []]


class TilingAutoencoder(Autoencoder):
    """Decodes 2x2 latents at a time, and calls `watch` with each of these tiles."""

    def __init__(self, watch):
        super().__init__()
        self.watch = watch

    def decode(self, latent):
        return tiled_decode(Tiling((4, 4, 4), True, True, False, 8, 8, 0.5), latent, self.decode_tile)

    def decode_tile(self, tile):
        self.watch(tile)
        return super().decode(tile)


def test_tiles_of_a_large_video_run_one_by_one():
    seen = []
    whole = make_pipeline(1)
    tiled = replace(whole, autoencoder=TilingAutoencoder(seen.append))
    ((_, expected),) = whole(REQUESTS[:1], OPTION, "t2v")
    ((_, video),) = tiled(REQUESTS[:1], OPTION, "t2v")
    np.testing.assert_allclose(video.astype(int), expected, atol=1)
    assert [tile.shape[2:4] for tile in seen] == [(2, 2), (2, 2), (2, 1), (1, 2), (1, 2), (1, 1)]
    assert not any(isinstance(tile, jax.core.Tracer) for tile in seen)


def test_a_reference_that_is_no_image_is_refused(tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    with pytest.raises(UserError, match=r"broken.png cannot be read"):
        list(make_pipeline(2)([replace(REQUESTS[0], references=(broken,))], OPTION, "i2v_head"))


def test_copies_of_the_image_are_cut_for_a_non_causal_autoencoder():
    autoencoder = Autoencoder()
    autoencoder.is_causal = False
    video = np.arange(13, dtype=np.uint8)[:, None, None, None] * np.ones((8, 4, 3), np.uint8)
    frames = {
        name: trim(video, 12, name, autoencoder)[:, 0, 0, 0].tolist()
        for name in ("t2v", "i2v_head", "i2v_tail", "i2v_loop", "v2v_head")
    }
    assert frames["t2v"] == frames["v2v_head"] == list(range(12))
    assert frames["i2v_head"] == list(range(3, 12))
    assert frames["i2v_tail"] == list(range(9))
    assert frames["i2v_loop"] == list(range(3, 9))


def test_a_batch_that_cannot_be_split_is_refused():
    mesh = one_device()
    with pytest.raises(UserError, match="batch_size"):
        Pipeline(Denoiser(), Autoencoder(), encode_text, mesh, 0, 1)
