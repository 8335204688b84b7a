"""Mean and deviation of latents: exact, from two sums in float64, in parts that processes write and add up.

The original's script subtracts a running mean and so measures no variance.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from opensora_jax.config.files import write_json


@dataclass(frozen=True)
class LatentSums:
    """Sums over latents drawn from (mean, variance), per channel in float64: their mean and deviation are exact.

    The spread of the draws counts too: a channel that the autoencoder hardly uses then stays small when the latent is
    normalised, instead of being blown up.
    """

    count: int = 0
    total: Float[np.ndarray, "*Z"] | list[float] | float = 0.0
    squares: Float[np.ndarray, "*Z"] | list[float] | float = 0.0

    def add(self, means: Float[np.ndarray, "*B Z"], variances: Float[np.ndarray, "*B Z"]) -> "LatentSums":
        """Returns the sums with these latents in them."""
        flat = np.asarray(means, np.float64).reshape(-1, means.shape[-1])
        squares = (flat**2 + np.asarray(variances, np.float64).reshape(flat.shape)).sum(0)
        return LatentSums(self.count + len(flat), np.asarray(self.total) + flat.sum(0), self.squares + squares)

    def plus(self, other: "LatentSums") -> "LatentSums":
        """Returns the sums over the latents of both."""
        total, squares = np.asarray(self.total) + other.total, np.asarray(self.squares) + other.squares
        return LatentSums(self.count + other.count, total, squares)

    def result(self) -> tuple[list[float], list[float]]:
        """Returns the mean and standard deviation of each channel."""
        mean = np.asarray(self.total) / self.count
        return mean.tolist(), np.sqrt(np.maximum(np.asarray(self.squares) / self.count - mean**2, 1e-12)).tolist()

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain numbers."""
        return {
            "count": self.count,
            "total": np.asarray(self.total).tolist(),
            "squares": np.asarray(self.squares).tolist(),
        }


@dataclass(frozen=True)
class Summed:
    """How far a process is with its clips: `next` is the place of the first that is left, the others are in the sums.

    `left_out` has the path of every clip without a latent, and why.
    """

    next: int = 0
    clips: int = 0
    left_out: tuple[tuple[str, str], ...] = ()
    sums: LatentSums = LatentSums()

    def add(self, means: Float[np.ndarray, "B ..."], variances: Float[np.ndarray, "B ..."], upto: int) -> "Summed":
        """Returns the sums with the latents of some clips in them, `upto` being the next place."""
        return replace(self, next=upto, clips=self.clips + len(means), sums=self.sums.add(means, variances))

    def plus(self, other: "Summed") -> "Summed":
        """Returns the sums over the clips of both."""
        return Summed(
            self.next + other.next,
            self.clips + other.clips,
            self.left_out + other.left_out,
            self.sums.plus(other.sums),
        )

    def write(self, path: Path, key: str) -> None:
        """Writes a file that `read` knows by its key."""
        write_json(path, {"key": key} | vars(self) | {"sums": self.sums.to_dict()})

    @classmethod
    def read(cls, path: Path, key: str) -> "Summed":
        """Returns what a file with this key holds; nothing is summed up yet where there is none."""
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):
            return cls()
        if found.pop("key") != key:
            return cls()
        left_out = tuple((clip, reason) for clip, reason in found["left_out"])
        return cls(found["next"], found["clips"], left_out, LatentSums(**found["sums"]))
