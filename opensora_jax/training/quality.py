"""How close frames are to others: PSNR and SSIM of every frame, as Open-Sora 1.2's eval/vae measures them.

Values are in [0, 1] (bytes / 255) and sums in float64. A clip has the mean of its frames. LPIPS is in models/lpips.
Source: hpcaitech/Open-Sora, branch opensora/v1.2, `eval/vae/cal_psnr.py`, `cal_ssim.py`; Wang et al. 2004 for SSIM.
"""

import numpy as np
from jaxtyping import Float

WINDOW, SIGMA = 11, 1.5  # pixels, of the Gaussian that weighs SSIM's neighbourhoods
C1, C2 = 0.01**2, 0.03**2
SMALLEST_ERROR = 1e-10  # a smaller mean squared error counts as this one: 100 dB


def psnr_db(a: Float[np.ndarray, "*B H W C"], b: Float[np.ndarray, "*B H W C"]) -> Float[np.ndarray, "*B"]:
    """Returns the peak signal-to-noise ratio of each frame in decibels, at most 100."""
    error = np.mean((a.astype(np.float64) - b) ** 2, axis=(-3, -2, -1))
    return -10 * np.log10(np.maximum(error, SMALLEST_ERROR))


def ssim(a: Float[np.ndarray, "*B H W C"], b: Float[np.ndarray, "*B H W C"]) -> Float[np.ndarray, "*B"]:
    """Returns the structural similarity of each frame, the mean over channels and places; 1 for equal frames.

    Raises: ValueError for frames smaller than the window.
    """
    *batch, height, width, _ = a.shape
    if min(height, width) < WINDOW:
        raise ValueError(f"SSIM takes frames of {WINDOW}x{WINDOW} or more: got {height}x{width}; use larger ones.")
    pairs = zip(a.reshape(-1, *a.shape[-3:]), b.reshape(-1, *a.shape[-3:]), strict=True)
    return np.array([_frame_ssim(*pair) for pair in pairs]).reshape(batch)


def _frame_ssim(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x.astype(np.float64), y.astype(np.float64)
    mean_x, mean_y, xx, yy, xy = _smooth(np.stack([x, y, x * x, y * y, x * y]))
    variances = xx - mean_x**2 + yy - mean_y**2
    covariance = xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    return float(np.mean(luminance * (2 * covariance + C2) / (variances + C2)))


def _smooth(maps: Float[np.ndarray, "N H W C"]) -> Float[np.ndarray, "N h w C"]:
    """Returns Gaussian means around all places whose window lies inside the frame."""
    weights = np.exp(-((np.arange(WINDOW) - WINDOW // 2) ** 2) / (2 * SIGMA**2))
    weights /= weights.sum()
    for _ in range(2):  # along the rows, then, turned, along the columns
        places = maps.shape[1] - WINDOW + 1
        smooth = sum(weight * maps[:, i : i + places] for i, weight in enumerate(weights))
        maps = np.swapaxes(np.asarray(smooth), 1, 2)
    return maps
