"""Classifier-free guidance as a plan: which forward passes each step needs and how they are weighted.

The three-branch guidance of Open-Sora 2.0, `u2 + g_image (u1 - u2) + g_text (c - u1)`, is linear in its
branches, so a step is a row of weights `c: g_text, u1: g_image - g_text, u2: 1 - g_image`, and a branch of
weight 0 is not run. Without a visual condition u1 and u2 are the same pass and their weights add up. In 50
steps with oscillation that leaves 80 passes for t2v and 110 for i2v instead of 150.
Source: `opensora/utils/sampling.py` (I2VDenoiser, DistilledDenoiser).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

STEADY_STEPS = 10  # oscillation starts after these
# branches: "cond" is prompt and reference, "uncond_text" null prompt and reference, "uncond" null prompt


@dataclass(frozen=True)
class GuidanceConfig:
    """Scales of text and image guidance; a scale of 1 means none. Field names are the original's."""

    guidance: float
    guidance_img: float | None  # needed by conditions other than t2v
    text_osci: bool
    image_osci: bool
    scale_temporal_osci: bool


@dataclass(frozen=True, eq=False)
class StepGuidance:
    """One step: the branches to run and their weights for each latent frame, which sum to 1."""

    branches: tuple[str, ...]
    weights: Float[np.ndarray, "N T"]


def plan_steps(
    config: GuidanceConfig,
    num_steps: int,
    condition: str,
    latent_frames: int,
    *,
    one_null_prompt: bool = True,
) -> list[StepGuidance]:
    """Returns the guidance of each of `num_steps` steps.

    `one_null_prompt` is False where the two null branches read different prompts, which only tests do.
    Raises: ValueError if the condition needs an image scale and there is none.
    """
    unmasked = condition == "t2v" or latent_frames == 1  # a single frame is never given
    if unmasked and one_null_prompt:
        text_scales = [oscillating(config.guidance, i, config.text_osci) for i in range(num_steps)]
        return [_step({"cond": [scale], "uncond": [1 - scale]}, latent_frames) for scale in text_scales]
    if config.guidance_img is None:
        raise ValueError(f"{condition} needs guidance_img, got none. Use 3.0, or 1.0 for no image guidance.")
    return [_conditioned_step(config, i, num_steps, condition, latent_frames) for i in range(num_steps)]


def plan_distilled(num_steps: int, latent_frames: int) -> list[StepGuidance]:
    """Returns one pass per step, for a model that takes its guidance scale as an input (Flux-dev)."""
    return [_step({"cond": [1.0]}, latent_frames)] * num_steps


def count_passes(plan: list[StepGuidance]) -> int:
    """Returns the number of forward passes per sample."""
    return sum(len(step.branches) for step in plan)


def oscillating(scale: float, step: int, oscillates: bool) -> float:
    """Returns the scale at a step: with oscillation, 1 on odd steps after the first ten."""
    return 1.0 if oscillates and step >= STEADY_STEPS and step % 2 else scale


def image_scales(
    config: GuidanceConfig, step: int, num_steps: int, condition: str, latent_frames: int
) -> Float[np.ndarray, "T"]:
    """Returns the image scale of each latent frame at a step.

    With temporal scaling (images only) it grows from 1 at the first frame to a bound that falls to 1 over the
    steps.
    """
    assert config.guidance_img is not None
    scale = oscillating(config.guidance_img, step, config.image_osci)
    if scale > 1 and config.scale_temporal_osci and condition.startswith("i2v"):
        bound = np.linspace(scale, 1, num_steps + 1)[step]
        return np.linspace(1, bound, latent_frames, dtype=np.float32)
    return np.full(latent_frames, scale, np.float32)


def _conditioned_step(
    config: GuidanceConfig, step: int, num_steps: int, condition: str, latent_frames: int
) -> StepGuidance:
    text = oscillating(config.guidance, step, config.text_osci)
    image = image_scales(config, step, num_steps, condition, latent_frames)
    return _step({"cond": [text], "uncond_text": image - text, "uncond": 1 - image}, latent_frames)


def _step(weights: dict, latent_frames: int) -> StepGuidance:
    rows = {name: np.broadcast_to(np.float32(row), latent_frames) for name, row in weights.items()}
    rows = {name: row for name, row in rows.items() if row.any()}
    return StepGuidance(tuple(rows), np.stack(list(rows.values())))
