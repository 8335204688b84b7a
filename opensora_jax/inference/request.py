"""What to sample, checked before anything is loaded: options shared by a run, and one request for each video.

Field names are those of the original's `sampling_option`. Its `temporal_reduction` and `is_causal_vae` are
missing on purpose: the autoencoder knows them.
"""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from opensora_jax.config.errors import UserError
from opensora_jax.data.plan import aspect
from opensora_jax.diffusion.conditions import CONDITIONS, frame_mask
from opensora_jax.diffusion.guidance import GuidanceConfig
from opensora_jax.models.sizes import check_gives_back

METHODS = ("i2v", "distill")  # three-branch guidance; guidance as an input of the model (Flux-dev)


@runtime_checkable
class LatentGeometry(Protocol):
    """What of an autoencoder a request has to fit."""

    strides: tuple[int, int, int]
    is_causal: bool

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Returns latent (frames, height, width); raises ValueError for sizes it cannot take."""
        ...

    def gives_back(self, frames: int) -> bool:
        """Returns whether decoding the latent of so many frames gives all of them."""
        ...


@dataclass(frozen=True)
class SamplingOption:
    """Size, steps and guidance of a run: `resolution` with `aspect_ratio`, or `height` with `width`."""

    resolution: str | None  # such as 256px
    aspect_ratio: str | None  # such as 16:9
    height: int | None  # pixels
    width: int | None
    num_frames: int
    num_steps: int
    shift: bool  # bend the schedule towards noise, more so for larger videos
    flow_shift: float | None  # this factor in place of the one that follows from the size
    guidance: float
    guidance_img: float | None
    text_osci: bool
    image_osci: bool
    scale_temporal_osci: bool
    method: str
    seed: int | None  # None draws one, 0 is a seed
    training_sizes: bool = False  # by name: the size of training, which can differ by a multiple (images of t2i2v)

    def __post_init__(self):
        """Check what does not depend on the models."""
        by_name = (self.resolution is not None, self.aspect_ratio is not None)
        by_size = (self.height is not None, self.width is not None)
        if by_name not in {(True, True), (False, False)} or by_size not in {(True, True), (False, False)}:
            _refuse("resolution goes with aspect_ratio, height with width: half a pair is missing. Give both.")
        if by_name == by_size:
            _refuse("give either resolution with aspect_ratio or height with width, and leave the others None.")
        if self.resolution is not None and "_" in self.resolution:
            name, _, suffix = self.resolution.partition("_")
            _refuse(f"resolution takes no '_{suffix}', as buckets do: got '{self.resolution}'. Use {name}.")
        if min(self.num_frames, self.num_steps) < 1:
            _refuse(f"num_frames and num_steps are at least 1: got {self.num_frames} and {self.num_steps}.")
        if self.flow_shift is not None and self.flow_shift <= 0:
            _refuse(f"flow_shift is above 0, and 1 shifts nothing: got {self.flow_shift}. None follows from the size.")
        if self.method not in METHODS:
            _refuse(f"unknown method '{self.method}'. Allowed: {', '.join(METHODS)}.")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            _refuse(f"seed lies in 0 .. 2^32 - 1: got {self.seed}. Use None for a random one.")

    @property
    def guidance_config(self) -> GuidanceConfig:
        """Returns the part that the guidance plan needs."""
        flags = (self.text_osci, self.image_osci, self.scale_temporal_osci)
        return GuidanceConfig(self.guidance, self.guidance_img, *flags)


@dataclass(frozen=True)
class Request:
    """One video: its prompt as the encoders see it, and the two integers that fix its noise."""

    prompt: str
    index: int  # position in the whole prompt list, so that a part of the list gives the same videos
    seed: int
    references: tuple[Path, ...] = ()  # images or videos, as the condition needs
    negative: str = ""


def image_size(option: SamplingOption, multiple: int) -> tuple[int, int]:
    """Returns (height, width) in pixels, both divisible by `multiple` (autoencoder stride times patch size).

    Raises: UserError for an unknown resolution or ratio, or a size that is not divisible, with the nearest
    that are.
    """
    if option.resolution is not None and option.aspect_ratio is not None:
        names = option.resolution, option.aspect_ratio
        return aspect.image_size(*names, spatial_unit=multiple, training=option.training_sizes, distinct=False)
    for name, value in (("height", option.height), ("width", option.width)):
        if value is None or value < 1 or value % multiple:
            low = max(1, (value or 1) // multiple) * multiple
            _refuse(f"{name} must be divisible by {multiple}: got {value}. Use {low} or {low + multiple}.")
    assert option.height is not None
    assert option.width is not None
    return option.height, option.width


def latent_shape(
    option: SamplingOption, cond_type: str, autoencoder: LatentGeometry, patch_size: int
) -> tuple[int, int, int]:
    """Returns (frames, height, width) of the latents to sample.

    Raises: UserError for sizes, frame counts or conditions that the models cannot take.
    """
    multiple = patch_size * max(autoencoder.strides[1:])
    height, width = image_size(option, multiple)
    try:
        shape = autoencoder.latent_shape(option.num_frames, height, width)
        check_gives_back(autoencoder, option.num_frames)
        if cond_type != "t2v":
            frame_mask(cond_type, shape[0], autoencoder.is_causal)
    except ValueError as error:
        raise UserError(f"sampling_option.num_frames: {error}") from error
    return shape


def check_condition(option: SamplingOption, cond_type: str) -> None:
    """Check a condition against the option.

    Raises: UserError for an unknown condition, one that shows nothing in an image, or a missing image scale.
    """
    if cond_type not in CONDITIONS:
        names = difflib.get_close_matches(cond_type, CONDITIONS, n=len(CONDITIONS), cutoff=0.0)
        raise UserError(f"Unknown cond_type '{cond_type}'. Use one of these, the nearest first: {', '.join(names)}.")
    if cond_type == "t2v":
        return
    if option.method == "distill":
        _refuse(f"method distill takes no reference: got cond_type {cond_type}. Use t2v, or method i2v.")
    if option.guidance_img is None:
        _refuse(f"cond_type {cond_type} needs guidance_img: got None. Use 3.0, or 1.0 for no image guidance.")
    if option.num_frames == 1:
        _refuse(f"an image has no frames to be given: got num_frames 1 with cond_type {cond_type}. Use t2v.")


def slug(prompt: str, longest: int = 60) -> str:
    """Returns the prompt as part of a file name: letters and digits of any script, else single dashes.

    It has at most `longest` letters and three times as many bytes: names of files are bounded in bytes.
    """
    letters = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:longest]
    return letters.encode()[: 3 * longest].decode(errors="ignore").rstrip("-") or "video"


def _refuse(message: str) -> None:
    raise UserError(f"sampling_option: {message}")
