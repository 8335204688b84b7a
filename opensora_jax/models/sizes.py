"""What networks share: numbers that configs may have, sizes that an autoencoder takes, and what its latent measures."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np

FAR = 1000  # frames, between which and the next ones that fit nobody looks further


@runtime_checkable
class GivesBack(Protocol):
    """What of an autoencoder says whether a clip can be decoded again."""

    def gives_back(self, frames: int) -> bool:
        """Returns whether decoding the latent of so many frames gives all of them."""
        ...


def check_least(config: Any, least: int, *names: str) -> None:
    """Raises: ValueError for a field of a config that is below `least` or NaN, or a list with such a number or none."""
    for name in names:
        value = getattr(config, name)
        if not np.size(value) or not np.min(value) >= least:
            raise ValueError(f"{name} is at least {least}: got {value}.")


def check_normaliser(config: Any, channels: int, *, factor: str, shift: str) -> None:
    """Raises: ValueError for what cannot normalise a latent: a factor of 0, or neither one number nor one a channel."""
    for name in (factor, shift):
        value = getattr(config, name)
        if isinstance(value, tuple) and len(value) != channels:
            raise ValueError(f"{name} has one number or {channels}, one a channel: got {len(value)}.")
        if not np.isfinite(value).all() or (name == factor and not np.all(value)):
            raise ValueError(f"{name} is finite{' and not 0' if name == factor else ''}: got {value}.")


def latent_size(height: int, width: int, stride: int) -> tuple[int, int]:
    """Returns (height, width) of the latent of frames.

    Raises: ValueError for sizes that the autoencoder cannot give back, naming the nearest that it can.
    """
    if min(height, width) < 1 or height % stride or width % stride:
        near = f"{max(1, round(height / stride)) * stride}x{max(1, round(width / stride)) * stride}"
        raise ValueError(
            f"The autoencoder takes heights and widths divisible by {stride}: got {height}x{width}: use {near}."
        )
    return height // stride, width // stride


def check_frames(frames: int, fits: Callable[[int], bool], takes: str) -> None:
    """Raises: ValueError for a number of frames below 1 or that does not fit, saying what does."""
    if frames < 1 or not fits(frames):
        raise ValueError(f"The autoencoder takes {takes}: got {frames}: {_nearest(frames, fits)}.")


def check_gives_back(autoencoder: GivesBack, frames: int) -> None:
    """Raises: ValueError for a clip that is encoded but not decoded to all its frames, naming the nearest that are."""
    if not autoencoder.gives_back(frames):
        raise ValueError(
            f"The autoencoder decodes a latent frame that is alone, in its clip or its tile, as an image, so it gives "
            f"back fewer than {frames} frames: {_nearest(frames, autoencoder.gives_back)}."
        )


def _nearest(frames: int, fits: Callable[[int], bool]) -> str:
    """Returns "use A or B": the next numbers of frames that fit, below and above."""
    frames = max(frames, 0)
    below = next((n for n in range(frames - 1, 0, -1) if fits(n)), None)
    above = next((n for n in range(frames + 1, frames + FAR) if fits(n)), None)
    return "use " + " or ".join(str(n) for n in (below, above) if n is not None)
