"""Geometry of clips: covering scale, central crop, thinning by frame rate, starts, picks; the original's pixels."""

import math

import numpy as np
import pytest

from opensora_jax.data.media.transforms import (
    frame_intervals,
    frame_picks,
    frame_start,
    original_center_pixels,
    original_pixels,
    resize_and_crop,
    target_fps,
)


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


def test_a_rate_that_no_clip_has_overflows_nothing():
    assert frame_intervals(np.array([1e300, 24]), 16).tolist() == [2**62, 2]


@pytest.mark.parametrize(("total", "count", "interval", "starts"), [(23, 5, 3, 8), (9, 9, 1, 1), (13, 5, 3, 1)])
def test_starts_cover_their_range_and_leave_room_for_all_frames(total, count, interval, starts):
    drawn = {frame_start(total, count, interval, seed) for seed in range(101)}
    assert drawn == set(range(starts))
    assert frame_picks(max(drawn), count, interval, total)[-1] < total


def test_a_seed_of_64_bits_is_taken():
    assert frame_start(11, 3, 1, np.uint64(2**64 - 1)) == (2**64 - 1) % 8


def test_a_clip_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="4 frames do not hold 5"):
        frame_start(4, 5, 3, 0)
    with pytest.raises(ValueError, match="17 frames do not hold 5 from frame 13 on"):
        frame_picks(13, 5, 1, 17)


def test_every_frame_is_picked_at_interval_1():
    assert frame_picks(7, 5, 1, 99).tolist() == [7, 8, 9, 10, 11]
    assert frame_picks(0, 1, 1, 1).tolist() == [0]


def test_picks_drift_by_the_interval_less_one():
    assert frame_picks(2, 7, 2, 99).tolist() == [2, 4, 6, 8, 10, 12, 15]
    assert frame_picks(0, 13, 3, 40).tolist() == [0, 3, 6, 9, 12, 15, 19, 22, 25, 28, 31, 34, 38]
    for count in (2, 17, 33, 129):
        for interval in (1, 2, 3, 7):
            picks = frame_picks(11, count, interval, 5000)
            exact = [11 + i * (count * interval - 1) // (count - 1) for i in range(count)]
            assert np.abs(picks - exact).max() <= 1  # float64 may round a whole number down, as the original's does
            assert (picks[0], picks[-1]) == (11, 11 + count * interval - 1)
            even = (count * interval - 1) / (count - 1)
            assert set(np.diff(picks)) <= {math.floor(even), math.ceil(even)}


def test_picks_close_up_where_the_video_ends():
    assert frame_picks(0, 5, 3, 13).tolist() == [0, 3, 6, 9, 12]
    assert frame_picks(1, 4, 3, 7).tolist() == [1, 2, 4, 6]


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, shape, np.uint8)


def sampled(line: np.ndarray, size: int) -> np.ndarray:
    """Bilinear without antialiasing, one line: pixels are points at their centres, held beyond the outer ones."""
    places = (np.arange(size) + 0.5) * len(line) / size - 0.5
    return np.interp(places, np.arange(len(line)), line.astype(np.float64))


@pytest.mark.parametrize(("source", "target"), [((23, 31), (13, 11)), ((17, 19), (29, 37)), ((13, 17), (13, 17))])
def test_videos_are_sampled_at_points(source, target):
    frames = noise(2, *source, 3)
    (rows, columns), (top, left, tall, wide) = resize_and_crop(*source, target)
    scaled = np.apply_along_axis(sampled, 2, np.apply_along_axis(sampled, 1, frames, rows), columns)
    expected = scaled[:, top : top + tall, left : left + wide] / 127.5 - 1
    found = original_pixels(frames, target, image=False)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_stripes_of_one_pixel_survive_in_videos_and_turn_grey_in_images():
    stripes = np.zeros((1, 33, 33, 3), np.uint8)
    stripes[:, :, ::2] = 255
    video, image = (original_pixels(stripes, (11, 11), image=flag) for flag in (False, True))
    assert set(np.unique(video)) == {-1, 1}  # every third pixel: wider stripes that were not there
    assert np.abs(image[:, :, 2:-2]).max() < 0.2


def test_images_are_scaled_as_bytes():
    found = original_pixels(noise(1, 23, 31, 3), (13, 11), image=True)
    levels = (found + 1) * 127.5
    np.testing.assert_allclose(levels, np.round(levels), atol=1e-4)
    assert np.abs(found).max() <= 1


@pytest.mark.parametrize("image", [False, True])
def test_a_size_that_fits_changes_nothing(image):
    frames = noise(1 if image else 3, 13, 17, 3)
    np.testing.assert_allclose(original_pixels(frames, (13, 17), image=image), frames / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("image", [False, True])
def test_one_colour_stays_that_colour(image):
    grey = np.full((2, 23, 41, 3), 77, np.uint8)
    for found in (original_pixels(grey, (11, 13), image=image), original_center_pixels(grey, 11, image=image)):
        np.testing.assert_allclose(found, 77 / 127.5 - 1, atol=1e-6)


def test_the_centre_of_a_large_image_is_averaged_first():
    blocks = np.kron(noise(11, 13), np.ones((4, 4), np.uint8))[None, :, :, None].repeat(3, -1)
    found = original_center_pixels(blocks, 11, image=True)  # twice halved it is the blocks again
    np.testing.assert_allclose(found[0, :, :, 0], noise(11, 13)[:, 1:12] / 127.5 - 1, atol=1e-6)
