"""From requests to videos: embed the prompts, sample latents in batches of one fixed size, decode in chunks.

The noise of a video depends on its seed and its place in the prompt list, never on the batch it runs in, so
another batch size gives the same videos. The last batch is filled up, so that everything compiles once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float, Int, Shaped, UInt8
from tqdm import tqdm

from opensora_jax.config.errors import UserError
from opensora_jax.diffusion import conditions, flow
from opensora_jax.diffusion.guidance import StepGuidance, count_passes, plan_distilled, plan_steps
from opensora_jax.diffusion.sampler import Progress, Prompt, Velocity, branch_prompts, denoise
from opensora_jax.inference.references import read_references
from opensora_jax.inference.request import Request, SamplingOption, image_size, latent_shape
from opensora_jax.models.codec import Codec
from opensora_jax.parallel.batch import batch_sharding, to_host
from opensora_jax.parallel.mesh import data_shards

Video = UInt8[np.ndarray, "T H W 3"]
TextEncoder = Callable[[Sequence[str]], tuple[Float[Array, "B S D"], Float[Array, "B P"]]]


@dataclass(frozen=True)
class Pipeline:
    """Sampling with given models; call it with requests.

    `denoiser` and `autoencoder` are NNX modules whose parameters lie on the mesh, `encode_text` maps prompts
    to token embeddings and pooled vectors. `batch_size` videos are denoised together, split over the mesh's
    data axes; `decode_batch_size` are decoded together. The autoencoder compiles its own parts, so that where it
    cuts a video into tiles, these run one by one.
    """

    denoiser: Any
    autoencoder: Any
    encode_text: TextEncoder
    mesh: Mesh
    batch_size: int
    decode_batch_size: int

    def __post_init__(self):
        """Check that the batch can be split over the mesh."""
        check_batch_sizes(self.mesh, self.batch_size, self.decode_batch_size)

    def __call__(
        self, requests: Sequence[Request], option: SamplingOption, cond_type: str
    ) -> Iterator[tuple[Request, Video]]:
        """Yields each request with its video, in order, a batch at a time.

        Raises: UserError for sizes and references that the models cannot take.
        """
        shape = latent_shape(option, cond_type, self.autoencoder, self.denoiser.config.patch_size)
        passes = count_passes(_plan(option, cond_type, shape[0]))
        logging.info("%d forward passes for %d steps of %s", passes, option.num_steps, cond_type)
        batches = list(_batches(requests, self.batch_size))
        steps, is_first = len(batches) * option.num_steps, jax.process_index() == 0
        with tqdm(total=steps, desc="sample", unit="step", disable=not is_first) as bar:
            for batch, wanted in batches:
                noise = draw_noise(batch, shape, self.autoencoder.latent_channels)
                references = self._references(batch, option, cond_type)
                progress = partial(_count, bar)
                latents = self.denoise(noise, self._prompts(batch), references, option, cond_type, progress=progress)
                videos = self._decode(latents[:wanted], option.num_frames, cond_type)
                yield from zip(batch, videos, strict=False)

    def denoise(
        self,
        noise: Float[Array, "B T H W C"],
        prompts: dict[str, Prompt],
        references: Sequence[Sequence[Float[Array, "_ H W C"]]],
        option: SamplingOption,
        cond_type: str,
        *,
        progress: Progress = iter,
    ) -> Float[Array, "B T H W C"]:
        """Returns the latents that `noise` becomes, given images put back.

        `prompts` holds one for each branch of guidance; `references[i]` are the reference latents of sample i, head
        first, none for t2v. Raises: ValueError for a reference that is missing or too short.
        """
        config = self.denoiser.config
        B, T, H, W, C = noise.shape
        mask, reference = conditions.condition(cond_type, references, (B, T, H, W, C), self.autoencoder.is_causal)
        graph, params = nnx.split(self.denoiser)
        with jax.set_mesh(self.mesh):  # the denoiser splits samples and tokens as it says
            latents = denoise(
                _velocity(graph),
                params,
                self._spread(noise),
                flow.schedule(option.num_steps, _alpha(option, (T, H, W), config.patch_size)),
                _plan(option, cond_type, T, one_null_prompt=prompts["uncond_text"] is prompts["uncond"]),
                prompts=self._spread(prompts),
                condition=self._spread(jnp.concatenate([mask, reference], -1)) if config.cond_embed else None,
                guidance=option.guidance if config.guidance_embed else None,
                progress=progress,
            )
        return conditions.paste(cond_type, latents, mask, reference)

    @property
    def _codec(self) -> Codec:
        return Codec(self.autoencoder, self.mesh)

    def _spread(self, batch: Any) -> Any:
        """Returns arrays split over the mesh along the batch axis."""
        return jax.device_put(batch, batch_sharding(self.mesh))

    def _prompts(self, batch: Sequence[Request]) -> dict[str, Prompt]:
        texts = [request.prompt for request in batch], [request.negative for request in batch]
        return branch_prompts(*(Prompt(*self.encode_text(text)) for text in texts))

    def _references(self, batch: Sequence[Request], option: SamplingOption, cond_type: str) -> list[list[Array]]:
        """Returns the reference latents of each request, which are posterior modes; the batch is encoded as one."""
        size = image_size(option, self.denoiser.config.patch_size * max(self.autoencoder.strides[1:]))
        read = {request: read_references(request, cond_type, size, self.autoencoder) for request in set(batch)}
        places = [np.stack(clips) for clips in zip(*(read[request] for request in batch), strict=True)]
        latents = [self._codec.encode(clips) for clips in places]
        return [[place[i] for place in latents] for i in range(len(batch))]

    def _decode(self, latents: Array, num_frames: int, cond_type: str) -> Iterator[Video]:
        size = min(self.decode_batch_size, self.batch_size)
        for start in range(0, len(latents), size):
            chunk = latents[start : start + size]
            padded = jnp.concatenate([chunk, jnp.repeat(chunk[-1:], size - len(chunk), axis=0)])
            videos = self._codec.decode(padded, num_frames)
            for number in range(len(chunk)):  # one by one: a chunk of a pod may be more than a device has room for
                yield trim(to_host(_one(videos, number)), num_frames, cond_type, self.autoencoder)


def check_batch_sizes(mesh: Mesh, batch_size: int, decode_batch_size: int) -> None:
    """Raises: UserError for sizes below 1, and for a batch that the mesh cannot split."""
    shards = data_shards(mesh)
    if batch_size < 1 or decode_batch_size < 1 or batch_size % shards:
        raise UserError(
            f"batch_size and decode_batch_size are at least 1, batch_size a multiple of the {shards} "
            f"data shards: got {batch_size} and {decode_batch_size}."
        )


def draw_noise(requests: Sequence[Request], shape: tuple[int, ...], channels: int) -> Float[Array, "B T H W C"]:
    """Returns standard normal noise, each sample from its own seed and index alone."""
    keys = [jax.random.fold_in(jax.random.key(request.seed), request.index) for request in requests]
    return jnp.stack([jax.random.normal(key, (*shape, channels)) for key in keys])


def trim(
    video: Shaped[np.ndarray, "T H W 3"], num_frames: int, cond_type: str, autoencoder: Any
) -> Shaped[np.ndarray, "t H W 3"]:
    """Returns the frames asked for, without those that repeat a given image.

    A non-causal autoencoder spreads an image over a whole latent frame, so all but one of its copies go.
    """
    video = video[:num_frames]
    if autoencoder.is_causal or num_frames == 1 or not cond_type.startswith("i2v"):
        return video
    head, tail = conditions.visible_frames(cond_type, causal=False)
    copies = autoencoder.strides[0] - 1
    return video[head * copies : len(video) - tail * copies]


def _plan(
    option: SamplingOption, cond_type: str, latent_frames: int, *, one_null_prompt: bool = True
) -> list[StepGuidance]:
    if option.method == "distill":
        return plan_distilled(option.num_steps, latent_frames)
    config = option.guidance_config
    return plan_steps(config, option.num_steps, cond_type, latent_frames, one_null_prompt=one_null_prompt)


def _alpha(option: SamplingOption, shape: tuple[int, int, int], patch_size: int) -> float:
    if not option.shift:
        return 1.0
    if option.flow_shift is not None:
        return option.flow_shift
    frames, height, width = shape
    return flow.shift_alpha(height * width / patch_size**2, frames)


@cache
def _velocity(graph: nnx.GraphDef) -> Velocity:
    """Returns the denoiser as a pure function of its parameters; one network, one compile."""

    def velocity(params, x, t, text, pooled, condition, guidance):
        return nnx.merge(graph, params)(x, t, text, pooled, condition, guidance)

    return velocity


def _batches(requests: Sequence[Request], size: int) -> Iterator[tuple[list[Request], int]]:
    """Yields (batch, how many of it are wanted), the last batch filled up with its own last request."""
    for start in range(0, len(requests), size):
        batch = list(requests[start : start + size])
        yield batch + batch[-1:] * (size - len(batch)), len(batch)


@jax.jit
def _one(videos: UInt8[Array, "B T H W 3"], number: Int[Array, ""] | int) -> UInt8[Array, "T H W 3"]:
    return videos[number]


def _count(bar: tqdm, steps: Iterable) -> Iterator:
    for step in steps:
        yield step
        bar.update()
