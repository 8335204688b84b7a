"""PSNR and SSIM of known pairs (tests/parity compares them with the original's)."""

import numpy as np
import pytest

from opensora_jax.training.quality import psnr_db, ssim

FRAMES = np.random.default_rng(0).random((2, 3, 13, 17, 3))


def test_psnr_of_a_known_error_is_that_of_every_frame():
    worse = FRAMES.copy()
    worse[1, 2] += 0.2
    found = psnr_db(FRAMES, worse)
    assert found.shape == (2, 3)
    assert found[1, 2] == pytest.approx(20 * np.log10(5))
    assert set(np.delete(found.ravel(), 5)) == {100.0}  # equal frames


def test_ssim_falls_with_contrast_and_is_1_for_equal_frames():
    flat = FRAMES.mean((-3, -2), keepdims=True) + 0.1 * (FRAMES - FRAMES.mean((-3, -2), keepdims=True))
    np.testing.assert_allclose(ssim(FRAMES, FRAMES), 1, rtol=1e-12)
    assert (ssim(FRAMES, flat) < 0.5).all()
    np.testing.assert_allclose(ssim(FRAMES, flat), ssim(flat, FRAMES))


def test_ssim_of_constant_frames_compares_their_brightness():
    a, b = np.full((1, 11, 12, 1), 0.25), np.full((1, 11, 12, 1), 0.75)
    np.testing.assert_allclose(ssim(a, b), (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4))


def test_frames_smaller_than_the_window_are_refused():
    with pytest.raises(ValueError, match="11x11 or more: got 10x12"):
        ssim(np.zeros((1, 10, 12, 3)), np.zeros((1, 10, 12, 3)))
