"""Geometry of clips: covering scale, central crop, thinning by frame rate, seeded starts."""

import math

import numpy as np
import pytest

from opensora_jax.data.transforms import frame_intervals, frame_start, resize_and_crop, target_fps


def test_the_scaled_frame_just_covers_the_target():
    rng = np.random.default_rng(3)
    for height, width, tall, wide in rng.integers(7, 211, (97, 4)).tolist():
        size, (top, left, h, w) = resize_and_crop(height, width, (tall, wide))
        assert (h, w) == (tall, wide)
        assert size[0] == tall or size[1] == wide
        assert 0 <= top <= size[0] - tall
        assert 0 <= left <= size[1] - wide
        assert abs(size[0] - tall - 2 * top) <= 1
        assert abs(size[1] - wide - 2 * left) <= 1


def test_a_wide_frame_loses_its_sides_and_a_tall_one_its_ends():
    assert resize_and_crop(720, 1280, (48, 48)) == ((48, 85), (0, 18, 48, 48))
    assert resize_and_crop(1280, 720, (48, 48)) == ((85, 48), (18, 0, 48, 48))


def test_half_a_pixel_rounds_down_in_videos_and_to_even_in_images():
    video, image = (resize_and_crop(16, 19, (16, 16), image=flag).crop for flag in (False, True))
    assert (video[1], image[1]) == (1, 2)  # 19 - 16 = 3 spare pixels
    assert resize_and_crop(16, 21, (16, 16), image=True).crop[1] == 2


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (8.0, (8.0, 1)),
        (23.976, (23.976, 1)),
        (24.0, (24, 1)),
        (25.0, (12, 2)),
        (59.94, (19, 3)),
        (math.nan, (0, 1)),
        (math.inf, (0, 1)),
    ],
)
def test_frame_rates_from_the_maximum_on_are_divided(fps, expected):
    assert target_fps(fps, 24) == expected


def test_the_column_of_intervals_agrees_with_single_rates():
    fps = np.array([0.0, 8, 15.99, 16, 16.01, 24, 29.97, 32, 33, 120, math.nan, math.inf])
    assert frame_intervals(fps, 16).tolist() == [target_fps(rate, 16)[1] for rate in fps.tolist()]


@pytest.mark.parametrize(("total", "count", "interval", "starts"), [(23, 5, 3, 8), (9, 9, 1, 1), (13, 5, 3, 1)])
def test_starts_cover_their_range_and_leave_room_for_all_frames(total, count, interval, starts):
    drawn = {frame_start(total, count, interval, seed) for seed in range(101)}
    assert drawn == set(range(starts))
    assert max(drawn) + (count - 1) * interval < total


def test_a_seed_of_64_bits_is_taken():
    assert frame_start(11, 3, 1, np.uint64(2**64 - 1)) == (2**64 - 1) % 8


def test_a_clip_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="12 frames do not hold 5 frames 3 apart"):
        frame_start(12, 5, 3, 0)
