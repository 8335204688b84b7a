"""Which condition every sample of a batch is trained with: drawn on the host from seed, step and sample.

So a restart and any number of hosts draw alike, and the device gets numbers, on which no shape depends.
Source: Open-Sora 2.0, `condition_config` of configs/diffusion/train and `opensora/utils/train.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from opensora_jax.config.build import suggestion
from opensora_jax.config.errors import UserError
from opensora_jax.data.loader import Batch
from opensora_jax.data.plan.plan import mix
from opensora_jax.diffusion import drawn_conditions
from opensora_jax.diffusion.drawn_conditions import HEAD, NAMES, TAIL

CONDITION = "condition"  # the entry of a batch with the numbers of the conditions in NAMES
STREAM = 0xC0D1  # keeps these draws apart from others of the same seed, step and sample


@dataclass(frozen=True)
class ConditionMix:
    """Conditions with the weights they are drawn by, for an autoencoder that is causal or not; without any: t2v.

    Weights need no sum of 1; a weight of 0 is that of a condition which is never drawn.
    """

    weights: dict[str, float]
    is_causal: bool

    @classmethod
    def parse(cls, weights: Mapping[str, float | int], is_causal: bool) -> "ConditionMix":
        """Returns the mix of a config's `condition_config`.

        Raises: UserError for an unknown name, a negative weight, or weights that are all 0.
        """
        for name, weight in weights.items():
            if name not in NAMES:
                raise UserError(f"config.condition_config has no condition {name!r}; {suggestion(name, NAMES)}")
            if not 0 <= weight < np.inf:
                raise UserError(f"config.condition_config.{name} is a weight, 0 or more: got {weight}; 0 leaves it out")
        if weights and not any(weights.values()):
            raise UserError("config.condition_config has no weight above 0: give t2v or another condition one")
        return cls({name: float(weight) for name, weight in weights.items() if weight}, is_causal)

    @property
    def shows_frames(self) -> bool:
        """Whether anything but text to video is trained."""
        return any(name != "t2v" for name in self.weights)

    def names(self, latent_frames: int) -> tuple[str, ...]:
        """Returns the conditions that a clip is long enough for."""
        return drawn_conditions.fitting(self.weights, latent_frames, self.is_causal)

    def references(self, latent_frames: int) -> dict[str, int]:
        """Returns the entries of a batch with what is encoded beside the clip itself, and their latent frames."""
        return drawn_conditions.references(self.weights, latent_frames, self.is_causal)

    def draw(self, seed: int, step: int, sample_ids: Int[np.ndarray, "B"], latent_frames: int) -> Int[np.ndarray, "B"]:
        """Returns each sample's number in NAMES: an image, or what none fits (see `check`), is text to video."""
        names = self.names(latent_frames)
        if latent_frames == 1 or not names:
            return np.full(len(sample_ids), NAMES.index("t2v"), np.int32)
        shares = np.cumsum([self.weights[name] for name in names])
        draws = (mix(seed, STREAM, step, sample_ids.astype(np.uint64)) >> np.uint64(11)) * 2.0**-53 * shares[-1]
        numbers = np.array([NAMES.index(name) for name in names], np.int32)
        return numbers[np.searchsorted(shares[:-1], draws, side="right")]

    def add(self, batch: Batch, seed: int, latent_frames: int) -> Batch:
        """Returns a host's batch with the condition of each sample; as it is where all are text to video."""
        if not self.shows_frames:
            return batch
        return batch | {CONDITION: self.draw(seed, int(batch["step"]), batch["sample_id"], latent_frames)}

    def check(self, examples: Mapping[str, Mapping[str, Any]], *, cond_embed: bool) -> None:
        """Check the mix against the model and a batch of every bucket, as a step reads it.

        Raises: UserError for a model without an input for conditions, a bucket in whose clips none of them fits, and
        cached latents without what conditions show.
        """
        if not self.shows_frames:
            return
        asked = ", ".join(name for name in self.weights if name != "t2v")
        if not cond_embed:
            raise UserError(
                f"config.condition_config asks for {asked}, but the model has cond_embed=False and takes no condition: "
                "set --config.model.cond_embed=True, or leave t2v alone"
            )
        for bucket, batch in examples.items():
            frames = batch["latent"].shape[1]
            if frames > 1 and not self.names(frames):
                raise UserError(
                    f"config.condition_config: {asked} need longer clips than those of {bucket}, which have {frames} "
                    "latent frames: add t2v or an i2v condition, or take the bucket out"
                )
            missing = self.references(frames).keys() - batch.keys()
            if missing - {HEAD, TAIL}:
                raise UserError(
                    "config.condition_config: v2v conditions show clips that a causal autoencoder encodes alone, which "
                    "cached latents do not hold: train from the videos, or leave these conditions out"
                )
            if missing:
                raise UserError(
                    "config.condition_config: i2v conditions show images that are encoded alone, which the cached "
                    f"latents of {bucket} do not hold: make them again with `dataset encode` and this condition_config"
                )
