"""Videos of a few prompts by a denoiser that is being trained: always the same prompts and the same noise."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from opensora_jax.inference.pipeline import Pipeline, TextEncoder, Video
from opensora_jax.inference.request import Request, SamplingOption, slug
from opensora_jax.parallel.mesh import data_shards


@dataclass(frozen=True)
class PreviewConfig:
    """A training config's `preview` section: every so many steps (0: never) a video of each prompt."""

    every: int
    prompts: tuple[str, ...]  # as the text encoders see them
    fps_save: float
    decode_batch_size: int
    sampling_option: SamplingOption

    def __post_init__(self):
        """Refuse what shows nothing."""
        if self.every < 0 or self.fps_save <= 0:
            raise ValueError(f"every is at least 0, fps_save above 0: got {self.every} and {self.fps_save}.")
        if self.every and not self.prompts:
            raise ValueError(f"every={self.every} needs prompts: got none.")


class Preview:
    """Samples a denoiser with an autoencoder; the prompts are embedded once, so that no text encoder has to stay."""

    def __init__(self, config: PreviewConfig, autoencoder: Any, encode_text: TextEncoder, mesh: Mesh):
        texts = [*config.prompts, ""]
        embedded = [np.asarray(part) for part in encode_text(texts)]
        self._texts = {text: [part[i] for part in embedded] for i, text in enumerate(texts)}
        self._config, self._autoencoder, self._mesh = config, autoencoder, mesh
        shards = data_shards(mesh)
        self._batch_size = -(-len(config.prompts) // shards) * shards

    def __call__(self, denoiser: nnx.Module) -> dict[str, tuple[Video, float]]:
        """Returns a video, with its rate, under the name of each prompt."""
        config = self._config
        decoded = max(config.decode_batch_size, 1)
        pipeline = Pipeline(denoiser, self._autoencoder, self._encode, self._mesh, self._batch_size, decoded)
        seed = config.sampling_option.seed or 0
        requests = [Request(prompt, index, seed) for index, prompt in enumerate(config.prompts)]
        videos = pipeline(requests, config.sampling_option, "t2v")
        return {f"{request.index:02d}_{slug(request.prompt)}": (video, config.fps_save) for request, video in videos}

    def _encode(self, prompts: Sequence[str]) -> tuple:
        parts = zip(*(self._texts[prompt] for prompt in prompts), strict=True)
        return tuple(jnp.stack(part) for part in parts)
