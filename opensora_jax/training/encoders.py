"""The frozen encoders in front of a training step: batches of videos and token ids to those of latents and embeddings.

They run as programs of their own, before the compiled step and not inside it. So the step is the one of cached latents,
and so are its memory and the batch that fits: an autoencoder has larger activations than the denoiser, and here tiles
and few clips at a time bound them. Frozen weights lie on the mesh, split as those of the denoiser are, and outside the
train state.
Source: Open-Sora 2.0, `scripts/diffusion/train.py` (prepare_inputs) and `opensora/utils/train.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float, Int, Key, Shaped

from opensora_jax.diffusion.drawn_conditions import HEAD, NAMES, TAIL, padded_frames, shows
from opensora_jax.models.codec import Codec
from opensora_jax.parallel.batch import batch_sharding
from opensora_jax.parallel.mesh import data_shards
from opensora_jax.training.accumulate import Batch
from opensora_jax.training.conditions import CONDITION, ConditionMix

CONSUMED = ("video", "t5_ids", "clip_ids")


@runtime_checkable
class TextNetwork(Protocol):
    """A text encoder: its parameters, and a compiled function of them and of token ids."""

    @property
    def params(self) -> Any:
        """The parameters."""

    @property
    def forward(self) -> Callable[[Any, Array], Array]:
        """Token ids to embeddings."""


@dataclass(frozen=True)
class VideoEncoder:
    """The autoencoder at work for training: latents of clips, and the references that conditions show.

    A latent is the posterior's mode, or a draw that depends on the seed, the step and the sample; references are modes,
    as in sampling. With `pad_images`, for autoencoders that are not causal, a shown image fills its latent frame alone:
    the sampler takes that for granted when it leaves repeated frames out, the original's training does not do it.
    """

    codec: Codec
    mix: ConditionMix
    posterior: Literal["mode", "sample"]
    seed: int
    batch_size: int  # clips at a time, see `in_parts`
    pad_images: bool = False

    def __post_init__(self):
        """Refuse what has no meaning."""
        if self.pad_images and self.codec.autoencoder.is_causal:
            raise ValueError("pad_images is for autoencoders that are not causal: others keep the first frame alone.")

    def latent_frames(self, video: Shaped[Array, "B T H W 3"] | Shaped[np.ndarray, "B T H W 3"]) -> int:
        """Returns the frames of a batch's latents."""
        return self.codec.autoencoder.latent_shape(*video.shape[1:4])[0]

    def __call__(self, batch: Batch) -> dict[str, Float[Array, "B t h w Z"]]:
        """Returns the latent of a batch's clips, and each reference that the mix needs at this length."""
        video, frames = batch["video"], self.latent_frames(batch["video"])
        stride, drawn = self.codec.autoencoder.strides[0], batch.get(CONDITION)
        if self.pad_images and drawn is not None:
            video = _padded(video, drawn, stride)
        keys = [_keys(self.seed, batch["step"], batch["sample_id"])] if self.posterior == "sample" else []
        shown = {} if drawn is None else self.mix.references(frames)
        references = {name: self._encode(_shown(video, drawn, name, count, stride)) for name, count in shown.items()}
        return {"latent": self._encode(video, *keys)} | references

    def _encode(self, *inputs: Array) -> Float[Array, "B t h w Z"]:
        """Returns the latents of videos, which keys may follow."""
        return in_parts(self.codec.encode, self.codec.mesh, self.batch_size, *inputs)


@dataclass(frozen=True)
class Encoders:
    """All frozen networks: `encoders(batch)` is what a step reads."""

    video: VideoEncoder
    t5: TextNetwork
    clip: TextNetwork

    def __call__(self, batch: Batch) -> Batch:
        """Returns the batch with latent, references, text and pooled in place of video and token ids."""
        made = self.video(batch)
        for name, network, ids in ("text", self.t5, "t5_ids"), ("pooled", self.clip, "clip_ids"):
            encode = partial(network.forward, network.params)
            made[name] = in_parts(encode, self.video.codec.mesh, self.video.batch_size, batch[ids])
        return {name: value for name, value in batch.items() if name not in CONSUMED} | made

    def abstract(self, batch: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of what a batch of these shapes becomes, placed alike: a step can be compiled for them."""
        place = batch_sharding(self.video.codec.mesh)
        as_bytes = {"video": jax.ShapeDtypeStruct(batch["video"].shape, jnp.uint8)}  # as pixels of any dtype
        made = {name: leaf for name, leaf in jax.eval_shape(self, batch | as_bytes).items() if name not in batch}
        kept = {name: leaf for name, leaf in batch.items() if name not in CONSUMED}
        return kept | {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for name, x in made.items()}


def in_parts(encode: Callable[..., Array], mesh: Mesh, batch_size: int, *inputs: Array) -> Float[Array, "B ..."]:
    """Returns `encode(*inputs)` in float32, split over the batch, made of at most `batch_size` samples at a time.

    But every data shard has one sample in each part at least, and all of them equally many.
    """
    shards, place = data_shards(mesh), batch_sharding(mesh)
    local = len(inputs[0]) // shards
    size = max(n for n in range(1, local + 1) if local % n == 0 and n <= max(1, batch_size // shards))
    parts = []
    for number in range(local // size):
        part = [_part(x, jnp.int32(number), shards=shards, size=size, place=place) for x in inputs]
        parts.append(encode(*part))
    return jax.device_put(_joined(parts, shards=shards, place=place), place)


@partial(jax.jit, static_argnames="seed")
def _keys(seed: int, step: Int[Array, ""], sample_ids: Int[Array, "B"]) -> Key[Array, "B"]:
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(partial(jax.random.fold_in, key))(sample_ids)


@partial(jax.jit, static_argnames=("shards", "size", "place"))
def _part(
    x: Shaped[Array, "B *rest"], part: Int[Array, ""], *, shards: int, size: int, place: Any
) -> Shaped[Array, "b *rest"]:
    """Returns `size` samples of every data shard: none of them moves."""
    x = x.reshape(shards, -1, size, *x.shape[1:])
    part_of_all = jax.lax.dynamic_index_in_dim(x, part, axis=1, keepdims=False)
    return jax.lax.with_sharding_constraint(part_of_all.reshape(-1, *x.shape[3:]), place)


@partial(jax.jit, static_argnames=("shards", "place"))
def _joined(parts: list[Shaped[Array, "b *rest"]], *, shards: int, place: Any) -> Shaped[Array, "B *rest"]:
    """Returns the samples of `_part` in their order."""
    x = jnp.stack([part.reshape(shards, -1, *part.shape[1:]) for part in parts], axis=1).astype(jnp.float32)
    return jax.lax.with_sharding_constraint(x.reshape(-1, *x.shape[3:]), place)


@partial(jax.jit, static_argnames=("name", "count", "stride"))
def _shown(
    video: Shaped[Array, "B T H W 3"], drawn: Int[Array, "B"], name: str, count: int, stride: int
) -> Shaped[Array, "B t H W 3"]:
    """Returns the pixels of a reference: the image at an end, or the clip at the end that each sample shows."""
    frames = 1 + (count - 1) * stride
    if name == HEAD:
        return video[:, :frames]
    at_tail = shows(drawn, count, TAIL, causal=True)[:, None, None, None, None]
    return video[:, -frames:] if name == TAIL else jnp.where(at_tail, video[:, -frames:], video[:, :frames])


@partial(jax.jit, static_argnames="stride")
def _padded(video: Shaped[Array, "B T H W 3"], drawn: Int[Array, "B"], stride: int) -> Shaped[Array, "B T H W 3"]:
    picks = jnp.asarray(np.stack([padded_frames(name, video.shape[1], stride) for name in NAMES]))[drawn]
    return jnp.take_along_axis(video, picks[:, :, None, None, None], axis=1)
