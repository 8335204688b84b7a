"""What an autoencoder makes of clips, of bytes and of pixels alike; those that go wrong are named and left out."""

from dataclasses import replace
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
from pyarrow.csv import read_csv

from opensora_jax.config.errors import UserError
from opensora_jax.data.media import video
from opensora_jax.models.codec import Codec
from opensora_jax.parallel.mesh import one_device
from opensora_jax.training.latent_sums import LatentSums
from opensora_jax.training.quality import psnr_db
from opensora_jax.training.reconstruction import (
    NORMALISATION,
    clip_moments,
    measure_latent,
    reconstruct,
    shown_fps,
    validate,
)
from tests.inference.fakes import BUCKETS, Autoencoder, Clips, clip_of, clip_table

ROWS = [(BUCKETS[0], row) for row in range(5)]


class Exact(Autoencoder):
    """Keeps all; black clips become infinite."""

    def latent_shape(self, frames, height, width):
        return frames, height, width

    def encode(self, video, keys=None):
        return video / jnp.where((video < -0.99).all((1, 2, 3, 4), keepdims=True), 0.0, 1.0)

    def decode(self, latent):
        return 0.5 * latent


class Black(Clips):
    """Clips of which one is black; as pixels, where asked, as `dataset.resize=original` gives them."""

    black, pixels = 3, False

    def read(self, sample_id, bucket, seed):
        clip = super().read(sample_id, bucket, seed)["video"] * (sample_id != self.black)
        return {"video": clip / np.float32(127.5) - 1 if self.pixels else clip.astype(np.uint8)}


def source(pixels=False, **options):
    clips = Black(clip_table(), **options)
    clips.pixels = pixels
    return clips


@pytest.fixture
def codec():
    return Codec(Exact(), one_device())


@pytest.mark.parametrize("pixels", [False, True], ids=["bytes", "pixels"])
def test_clips_of_bytes_and_of_pixels_are_reconstructed_and_measured_alike(codec, tmp_path, pixels):
    found = list(reconstruct(codec, source(pixels), ROWS, 2))
    for row, clip, made in found:
        np.testing.assert_array_equal(clip, clip_of(row, BUCKETS[0]))
        np.testing.assert_allclose(made, clip / 2 + 63.75, atol=0.51)
    measured = validate(codec, source(pixels), ROWS, ["a"] * 23, 2, tmp_path)
    expected = [psnr_db(clip / 255, made / 255).mean() for _, clip, made in found]
    assert measured == {"psnr_db": np.mean(expected), "psnr_db_worst": np.min(expected), "clips": 4}


def test_clips_that_become_no_numbers_are_named_counted_and_left_out(codec, tmp_path):
    clips = source(broken=(1,))
    assert [row for row, _, _ in reconstruct(codec, clips, ROWS, 2)] == [0, 2, 4]
    reason = "its latent or its reconstruction is NaN or infinite"
    assert clips.bad_clips == {"/clips/1.mp4": "broken in 1 places", "/clips/3.mp4": reason}
    validate(codec, source(), ROWS, [f"clip {row}" for row in range(23)], 2, tmp_path)
    assert read_csv(tmp_path / "captions.csv")["text"].to_pylist() == [f"clip {row}" for row in (0, 1, 2, 4)]
    with pytest.raises(UserError, match=r"more than max_bad_rate = 0\.0; last: /clips/3\.mp4 \(its latent or"):
        list(reconstruct(codec, source(max_bad_rate=0.0), ROWS, 2))


def test_a_latent_that_is_no_number_is_not_summed_up(codec):
    clips = source(broken=(1,))
    found = list(clip_moments(codec, clips, ROWS, 2))
    assert [(ids, len(mean)) for ids, mean, _ in found] == [([0], 1), ([2, 3], 1), ([4], 1)]
    assert clips.bad_clips["/clips/3.mp4"] == "its latent is NaN or infinite"
    measured = measure_latent(codec, source(broken=(1,)), ROWS, 2)
    assert measured["clips"] == 3
    kept = np.stack([clip_of(row, BUCKETS[0]) for row in (0, 2, 4)]) / 127.5 - 1
    np.testing.assert_allclose(measured["shift_factor"], kept.mean((0, 1, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(measured["scale_factor"], 1 / kept.std((0, 1, 2, 3)), rtol=1e-5)


def test_no_clip_at_all_is_an_error_for_a_latent_and_a_zero_for_validation(codec, tmp_path):
    with pytest.raises(UserError, match="none of the 5 clips has a latent to measure"):
        measure_latent(codec, source(broken=range(5)), ROWS, 2)
    assert validate(codec, source(broken=range(5)), ROWS, ["a"] * 23, 2, tmp_path) == {"clips": 0}


def test_thinned_frames_are_shown_as_fast_as_the_clip(codec, tmp_path):
    clips = source()
    clips.facts = clips.facts | {"fps": np.full(23, 60.0)}
    assert shown_fps(clips, 2) == 20  # every third
    validate(codec, clips, ROWS[:1], ["a"] * 23, 1, tmp_path)
    assert video.probe(tmp_path / "00000_0.mp4").fps == Fraction(20)
    assert shown_fps(source(), 2) == 8
    assert shown_fps(source(), 20) == 1  # an image


def test_sums_of_two_parts_are_those_of_the_whole():
    draws = np.random.default_rng(0).normal(3, 2, (6, 7, 3))
    parts = [LatentSums().add(part, part**2) for part in np.split(draws, [2])]
    whole = LatentSums().add(draws, draws**2)
    np.testing.assert_allclose(LatentSums().plus(parts[0]).plus(parts[1]).result(), whole.result(), rtol=1e-12)
    assert replace(parts[0], count=1).plus(parts[1]).count == 1 + parts[1].count


@pytest.mark.parametrize("kind", NORMALISATION)
def test_the_fields_of_each_type_normalise_its_latents(kind):
    latent = np.random.default_rng(0).normal((1, 2, 3), (2, 3, 4), (10_000, 3))
    fields = NORMALISATION[kind](latent.mean(0).tolist(), latent.std(0).tolist())
    if kind == "dc_ae":
        assert set(fields) == {"scaling_factor"}
        np.testing.assert_allclose((latent / fields["scaling_factor"]).std(), 1, rtol=1e-6)
        return
    if kind == "opensora_vae":
        normal = (latent - fields["shift"]) / fields["scale"]
    else:
        normal = (latent - fields["shift_factor"]) * fields["scale_factor"]
    np.testing.assert_allclose(normal.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(normal.std(0), 1, rtol=1e-6)
