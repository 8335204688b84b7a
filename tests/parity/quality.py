"""Numbers about results: PSNR, SSIM, the bytes of saved samples, and statistics of latents."""

from collections.abc import Sequence
from functools import reduce

import numpy as np

from opensora_jax.models.codec import to_bytes
from opensora_jax.training.latent_sums import LatentSums
from opensora_jax.training.quality import psnr_db, ssim
from tests.parity.golden import Golden, Tolerance, absolute, channels_last

QUALITY = Tolerance(1e-4, absolute)
STATISTIC = Tolerance(1e-5)


def rounded_otherwise(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Returns the share of bytes that differ; all of them when one differs by more than 1."""
    return float((ours != theirs).mean()) if absolute(ours, theirs) <= 1 else 1.0


def metrics(golden: Golden) -> None:
    """Drive `metrics*`: means and deviations over the batch, frame by frame."""
    inputs = golden.part("in/")
    a, b = (np.moveaxis(inputs[name], 2, -1) for name in "ab")
    for name, found in (("psnr", psnr_db(a, b)), ("ssim", ssim(a, b)), ("ssim_gray", ssim(a[..., :1], b[..., :1]))):
        stored = {"": found.mean(0), "_std": found.std(0)}
        golden.compare_found({f"out/{name}{what}_per_frame": value for what, value in stored.items()}, QUALITY)
    sample = np.asarray(to_bytes(channels_last(inputs["sample"])[None])[0])
    golden.compare("out/save_sample_uint8", sample, Tolerance(1e-3, rounded_otherwise))


def latents(golden: Golden) -> None:
    """Drive `vae_stats*`: ours are the exact statistics, and differ where the original's running formula is wrong.

    It weighs batches alike whatever their sizes, and subtracts the mean of the batches so far.
    """
    given = golden.part("in/")
    batches = [np.moveaxis(given[f"z{i}"], 1, -1) for i in range(len(given))]
    means, deviations = np.array([_pooled(batches[: i + 1]) for i in range(len(batches))]).T
    golden.compare("out/true_mean_std_for_contrast", [means[-1], deviations[-1]], STATISTIC)
    alike = [i for i in range(len(batches)) if len({batch.size for batch in batches[: i + 1]}) == 1]
    golden.check("shift of batches of one size", means[alike], golden.values["out/shift"][alike], STATISTIC)
    golden.check("scale of the first batch", deviations[:1], golden.values["out/scale"][:1], STATISTIC)

    mean, deviation = _of_channels(batches)
    for name, ours, right in (
        ("shift", means, len(alike) == len(batches)),
        ("v12_channel_mean", mean, len(alike) == len(batches)),
        ("scale", deviations, len(batches) == 1),
        ("v12_channel_std", deviation, len(batches) == 1),
    ):
        (golden.compare if right else golden.differs)(f"out/{name}", np.asarray(ours), STATISTIC)


def _pooled(batches: Sequence[np.ndarray]) -> tuple[float, float]:
    """Returns mean and deviation of all values, from those of the channels."""
    mean, deviation = _of_channels(batches)
    return mean.mean(), np.sqrt((deviation**2 + mean**2).mean() - mean.mean() ** 2)


def _of_channels(batches: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and deviation of every channel."""
    sums = reduce(lambda sums, batch: sums.add(batch, np.zeros_like(batch)), batches, LatentSums())
    return tuple(map(np.asarray, sums.result()))
