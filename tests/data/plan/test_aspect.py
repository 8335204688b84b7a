"""Sizes and ratios of resolution names, against values of the original and by the definition of "closest"."""

import numpy as np
import pytest

from opensora_jax.config.errors import UserError
from opensora_jax.data.plan.aspect import (
    RATIOS,
    closest_ratios,
    image_size,
    nominal_ratio,
    num_pixels,
    ratio_sizes,
    resolution_sizes,
)


@pytest.mark.parametrize(
    ("resolution", "ratio", "training", "expected"),
    [
        ("256px", "16:9", True, (192, 336)),
        ("256px", "2.39:1", True, (160, 400)),
        ("768px", "16:9", False, (576, 1024)),
        ("768px", "9:16", False, (1024, 576)),
        ("1024px", "1:1", True, (1024, 1024)),
    ],
)
def test_sizes_are_those_of_the_original(resolution, ratio, training, expected):
    assert image_size(resolution, ratio, spatial_unit=16, training=training) == expected


def test_training_keeps_one_name_per_size_and_sampling_keeps_all():
    training = ratio_sizes(256**2, spatial_unit=16)
    assert not {"1.85:1", "5:8", "8:5"} & set(training)
    assert set(ratio_sizes(256**2, spatial_unit=16, training=False)) >= set(RATIOS)


@pytest.mark.parametrize("unit", [8, 16, 32])
def test_every_side_is_a_multiple_of_the_spatial_unit(unit):
    sides = [side for size in ratio_sizes(360**2, spatial_unit=unit).values() for side in size]
    assert all(side % unit == 0 and side > 0 for side in sides)


def test_a_resolution_name_counts_pixels():
    assert (num_pixels("256px"), num_pixels("360p"), num_pixels("48px_ar1:1")) == (65536, 230400, 2304)


@pytest.mark.parametrize("name", ["", "px", "256", "0px", "-3p", "256px2", "²px"])
def test_another_resolution_name_is_refused(name):
    with pytest.raises(UserError, match='write it as "256px"'):
        num_pixels(name)


def test_a_setting_keeps_one_ratio():
    assert resolution_sizes("512px_max", spatial_unit=16)[1].keys() == {"4:3"}
    assert resolution_sizes("256px_ar16:9", spatial_unit=16)[1] == {"16:9": (192, 336)}


@pytest.mark.parametrize("unit", [8, 16])
def test_a_ratio_whose_size_another_shares_can_still_be_asked_for(unit):
    assert "1:1" not in ratio_sizes(48**2, spatial_unit=unit)
    assert resolution_sizes("48px_ar1:1", spatial_unit=unit) == (2304, {"1:1": (48, 48)})


@pytest.mark.parametrize("name", ["256px_ar7:5", "256px_min", "256px_1:1", "256px_ar"])
def test_an_unknown_setting_is_refused_with_the_choices(name):
    with pytest.raises(UserError, match=r"2\.39:1, 2:1"):
        resolution_sizes(name, spatial_unit=16)


def test_a_unit_larger_than_the_frame_is_refused():
    with pytest.raises(UserError, match="no room for a spatial unit of 32"):
        ratio_sizes(31**2, spatial_unit=32)


def test_the_closest_ratio_is_the_first_of_the_nearest_nominal_ones():
    rng = np.random.default_rng(5)
    height, width = rng.integers(1, 97, (2, 499))
    names = [*ratio_sizes(256**2, spatial_unit=16), "1:1"]  # the last can never win
    chosen = closest_ratios(height, width, names)
    for h, w, index in zip(height.tolist(), width.tolist(), chosen.tolist(), strict=True):
        assert index == int(np.argmin([abs(h / w - nominal_ratio(name)) for name in names]))
