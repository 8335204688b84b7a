"""Whole runs: noise, prompts and references through the pipeline, a fake decoder, and the frames that are kept."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import nnx
from jax import Array

from opensora_jax.diffusion import conditions
from opensora_jax.diffusion.guidance import StepGuidance
from opensora_jax.inference import pipeline
from opensora_jax.inference.request import SamplingOption, latent_shape
from opensora_jax.parallel.mesh import one_device
from tests.parity import mmdit
from tests.parity.golden import Golden, channels_first, channels_last
from tests.parity.sampling import TIMES, TRAJECTORY, branch_prompts, needed_passes, one_null, read_references


class FakeAutoencoder:
    """Decodes as `fake_decode` says: three channels, each latent position repeated, the first frame once if causal."""

    def __init__(self, about: dict[str, Any], channels: int):
        strides = re.search(r"compression=\((\d+),\s*(\d+),\s*(\d+)\)", about["fake_decode"])
        assert strides, "fake_decode must name the compression"
        self.strides = tuple(map(int, strides.groups()))
        self.is_causal, self.latent_channels = about["is_causal_vae"], channels

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Returns (frames, height, width) of a latent."""
        t, h, w = self.strides
        latent = (frames - 1) // t + 1 if self.is_causal or frames == 1 else frames // t
        return latent, height // h, width // w

    def gives_back(self, frames: int) -> bool:
        """Returns whether decoding gives all frames back."""
        return True

    def decode(self, latents: Array | np.ndarray) -> np.ndarray:
        """Returns pixels B T H W 3."""
        pixels = np.asarray(latents)[..., :3]
        for axis, stride in enumerate(self.strides, start=1):
            pixels = np.repeat(pixels, stride, axis=axis)
        return pixels[:, self.strides[0] - 1 :] if self.is_causal else pixels


def whole_run(golden: Golden) -> None:
    """Drive `api_*`: noise, prompts and references through the pipeline to the frames that are kept."""
    about, inputs = golden.about, golden.part("in/")
    network = mmdit.load(golden)
    noise = channels_last(inputs["z_noise"])
    fake = FakeAutoencoder(about, noise.shape[-1])
    option, name = _option(about), about["cond_type"]
    golden.check("latent shape", latent_shape(option, name, fake, network.config.patch_size), noise.shape[1:4])
    latents, steps = _sample(network, fake, noise, inputs, option, name)
    passes = sum(len(step.branches) for step, *_ in steps)
    golden.check("passes", passes, needed_passes(about, noise.shape[1], one_null(inputs)))
    golden.compare("out/t_vec_each_step", np.stack([now for _, now, _ in steps]), TIMES)
    expected = _paste_all(golden.take("out/latent_passed_to_decode"), name, read_references(inputs, len(noise)), fake)
    golden.check("out/latent_passed_to_decode", channels_first(latents), expected, TRAJECTORY)
    video, theirs = _frames(latents, about, fake), golden.take("out/video").copy()
    theirs[1:] = _frames(np.moveaxis(expected, 1, -1), about, fake)[1:]  # as with the latents, see _paste_all
    golden.check("out/video", video, theirs, TRAJECTORY)


def _option(about: dict[str, Any]) -> SamplingOption:
    names = ("height", "width", "num_frames", "num_steps", "flow_shift", "guidance", "guidance_img")
    flags = ("text_osci", "image_osci", "scale_temporal_osci", "seed")
    fields = {name: about[name] for name in (*names, *flags)}
    shift, method = about.get("shift", True), about.get("method", "i2v")
    return SamplingOption(resolution=None, aspect_ratio=None, shift=shift, method=method, **fields)


def _sample(
    network: mmdit.Network,
    fake: FakeAutoencoder,
    noise: Array,
    inputs: dict[str, np.ndarray],
    option: SamplingOption,
    cond_type: str,
) -> tuple[Array, list[tuple[StepGuidance, float, float]]]:
    """Returns the latents of the pipeline and the steps it took."""
    steps: list[tuple[StepGuidance, float, float]] = []

    def watch(given):
        steps.extend(given)
        return given

    model = nnx.merge(network.graphdef, network.params)
    mesh = one_device()
    sample = pipeline.Pipeline(model, fake, _no_text, mesh, len(noise), len(noise)).denoise
    references = read_references(inputs, len(noise)) or []
    prompts = branch_prompts(inputs)
    if one_null(inputs):  # as in use; two different negative prompts are what only goldens have
        prompts["uncond"] = prompts["uncond_text"]
    return sample(noise, prompts, references, option, cond_type, progress=watch), steps


def _no_text(prompts: Sequence[str]) -> tuple[Array, Array]:
    raise AssertionError("the embeddings of a case are given")


def _paste_all(
    latents: np.ndarray, cond_type: str, references: Sequence[Sequence[Array]] | None, fake: FakeAutoencoder
) -> np.ndarray:
    """Returns the expected latents with references in every sample.

    The original puts them back in the first sample only, which docs/deviations.md lists among its mistakes.
    """
    if not cond_type.startswith("i2v") or references is None:
        return latents
    head, tail = conditions.visible_frames(cond_type, fake.is_causal)
    latents = latents.copy()
    for sample, given in zip(latents[1:], references[1:], strict=True):
        if head:
            sample[:, :head] = channels_first(given[0])[:, :head]
        if tail:
            sample[:, -tail:] = channels_first(given[-1])[:, -tail:]
    return latents


def _frames(latents: Array | np.ndarray, about: dict[str, Any], fake: FakeAutoencoder) -> np.ndarray:
    """Returns the frames that remain of the decoded latents, channels first."""
    videos = fake.decode(latents)
    kept = [pipeline.trim(video, about["num_frames"], about["cond_type"], fake) for video in videos]
    return channels_first(np.stack(kept))
