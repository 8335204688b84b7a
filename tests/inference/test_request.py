from dataclasses import replace

import pytest

from opensora_jax.config.errors import UserError
from opensora_jax.inference.request import (
    SamplingOption,
    check_condition,
    image_size,
    latent_shape,
    slug,
)

OPTION = SamplingOption(
    resolution=None,
    aspect_ratio=None,
    height=48,
    width=80,
    num_frames=9,
    num_steps=5,
    shift=True,
    flow_shift=None,
    guidance=3.0,
    guidance_img=None,
    text_osci=False,
    image_osci=False,
    scale_temporal_osci=False,
    method="i2v",
    seed=0,
)


class Autoencoder:
    strides = (4, 8, 8)
    is_causal = True

    def latent_shape(self, frames, height, width):
        if frames % 4 != 1:
            raise ValueError(f"1 + 4 n frames: got {frames}. Use 9 or 13.")
        return (frames - 1) // 4 + 1, height // 8, width // 8

    def gives_back(self, frames):
        return frames % 4 == 1 and frames != 13


def test_latents_have_the_shape_that_the_autoencoder_says():
    assert latent_shape(OPTION, "t2v", Autoencoder(), patch_size=2) == (3, 6, 10)


def test_a_resolution_name_gives_the_size_of_its_ratio():
    named = replace(OPTION, resolution="256px", aspect_ratio="16:9", height=None, width=None)
    assert image_size(named, 16) == (192, 336)


def test_seed_zero_is_a_seed_and_none_is_allowed():
    assert OPTION.seed == 0
    assert replace(OPTION, seed=None).seed is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": None}, "half a pair"),
        ({"resolution": "256px"}, "half a pair"),
        ({"resolution": "256px", "aspect_ratio": "1:1"}, "give either"),
        ({"height": None, "width": None}, "give either"),
        ({"num_steps": 0}, "at least 1"),
        ({"num_frames": -3}, "at least 1"),
        ({"method": "ddim"}, "'ddim'.*i2v, distill"),
        ({"seed": -1}, "0 .. 2"),
        ({"flow_shift": 0.0}, "flow_shift is above 0"),
        (
            {"resolution": "768px_max", "aspect_ratio": "1:1", "height": None, "width": None},
            "no '_max'.*got '768px_max'. Use 768px",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        replace(OPTION, **change)


def test_a_size_off_the_grid_is_refused_with_its_neighbours():
    with pytest.raises(UserError, match=r"height must be divisible by 16: got 50. Use 48 or 64"):
        image_size(replace(OPTION, height=50), 16)


def test_a_frame_count_the_autoencoder_cannot_take_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"num_frames.*got 10. Use 9 or 13"):
        latent_shape(replace(OPTION, num_frames=10), "t2v", Autoencoder(), patch_size=2)


def test_frames_that_decoding_does_not_give_back_are_refused_with_the_nearest_that_it_does():
    assert latent_shape(replace(OPTION, num_frames=17), "t2v", Autoencoder(), patch_size=2) == (5, 6, 10)
    with pytest.raises(UserError, match=r"num_frames.*fewer than 13 frames: use 9 or 17"):
        latent_shape(replace(OPTION, num_frames=13), "t2v", Autoencoder(), patch_size=2)


def test_a_video_too_short_for_its_condition_is_refused():
    with pytest.raises(UserError, match="v2v_head gives 9 latent frames, the video has 3"):
        latent_shape(OPTION, "v2v_head", Autoencoder(), patch_size=2)


def test_an_unknown_condition_is_refused_with_the_nearest_first():
    with pytest.raises(UserError, match=r"Unknown cond_type 'i2v_hed'.*nearest first: i2v_head, .*t2v"):
        check_condition(OPTION, "i2v_hed")


def test_a_condition_needs_an_image_scale_and_a_video():
    check_condition(OPTION, "t2v")
    guided = replace(OPTION, guidance_img=3.0)
    check_condition(guided, "i2v_head")
    with pytest.raises(UserError, match="needs guidance_img"):
        check_condition(OPTION, "i2v_head")
    with pytest.raises(UserError, match="num_frames 1 with cond_type i2v_head"):
        check_condition(replace(guided, num_frames=1), "i2v_head")


def test_a_distilled_model_takes_no_reference():
    with pytest.raises(UserError, match="distill takes no reference"):
        check_condition(replace(OPTION, method="distill", guidance_img=1.0), "i2v_tail")


def test_a_slug_is_safe_as_a_file_name():
    assert slug("A red Circle, moves /to/ the right!") == "a-red-circle-moves-to-the-right"
    assert slug("../../etc") == "etc"
    assert slug("雨, Meer") == "雨-meer"
    assert slug("???") == "video"
    assert len(slug("word " * 50)) <= 60
    assert len(slug("𓀀" * 60).encode()) == 180
