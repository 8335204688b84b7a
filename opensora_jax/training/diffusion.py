"""The training objective of the denoiser: rectified flow on latents, with conditions and with text dropped at random.

What chance decides is drawn apart from what follows from it, so that tests, and validation at fixed times, can give it.
Source: hpcaitech/Open-Sora, `scripts/diffusion/train.py` and `opensora/utils/train.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float

from opensora_jax.config.errors import UserError
from opensora_jax.diffusion import drawn_conditions, flow
from opensora_jax.training.accumulate import Batch, Metrics
from opensora_jax.training.conditions import CONDITION, ConditionMix


@dataclass(frozen=True)
class DropoutRatio:
    """Probability of replacing the text by the null text, for each encoder alone and independently."""

    t5: float
    clip: float

    def __post_init__(self):
        """Check that these are probabilities."""
        if not (0 <= self.t5 <= 1 and 0 <= self.clip <= 1):
            raise ValueError(f"t5 and clip are probabilities, from 0 to 1: got {self.t5} and {self.clip}.")


@dataclass(frozen=True)
class FlowConfig:
    """How training times are drawn; `flow_shift` replaces the shift that follows from the latent's size."""

    time_sampling: Literal["logit_normal", "uniform"]
    stratified: bool
    flow_shift: float | None

    def __post_init__(self):
        """Check what would put all times in one place."""
        if self.flow_shift is not None and self.flow_shift <= 0:
            raise ValueError(f"flow_shift is above 0, or None for that of the size: got {self.flow_shift}.")


class NullText(NamedTuple):
    """Embeddings of the empty caption."""

    text: Float[Array, "S E"]
    pooled: Float[Array, "P"]

    def padded(self, length: int) -> Float[Array, "L E"]:
        """Returns the token embeddings at the length of a batch's texts, the last one repeated.

        Raises: ValueError for texts that are shorter.
        """
        missing = length - len(self.text)
        if missing < 0:
            raise ValueError(f"The null text has {len(self.text)} tokens, the texts have {length}: encode both alike.")
        return jnp.concatenate([self.text, jnp.repeat(self.text[-1:], missing, axis=0)])


class Draws(NamedTuple):
    """What chance decides of a batch: shifted times, noise, and which rows lose which text."""

    t: Float[Array, "B"]
    noise: Float[Array, "B T H W C"]
    without_t5: Bool[Array, "B"]
    without_clip: Bool[Array, "B"]


class Inputs(NamedTuple):
    """The arguments of the denoiser."""

    x: Float[Array, "B T H W C"]
    t: Float[Array, "B"]
    text: Float[Array, "B S E"]
    pooled: Float[Array, "B P"]
    condition: Float[Array, "B T H W M"] | None
    guidance: Float[Array, "B"] | None


@dataclass(frozen=True, eq=False)
class Objective:
    """The loss of a denoiser, `objective(model, batch, objective.draw(batch, key))`.

    A batch has `latent` (BTHWC), `text` (BSE) and `pooled` (BP), and where the mix shows frames the number of each
    sample's condition and the references that the mix names. `guidance` goes to models that take it as an input. With
    `no_i2v_ref_loss` latent frames that are given images do not count.
    """

    flow: FlowConfig
    dropout_ratio: DropoutRatio
    null: NullText
    mix: ConditionMix
    guidance: float | None
    no_i2v_ref_loss: bool

    def __call__(self, model: nnx.Module, batch: Batch, draws: Draws) -> tuple[Array, Metrics]:
        """Returns the loss of a batch, a mean over its samples."""
        velocity = model(*self.inputs(batch, draws))
        wanted = flow.target(_float32(batch["latent"]), draws.noise)
        return flow.loss(velocity, wanted, self.learnt_frames(batch)), {}

    def check(self, examples: Mapping[str, Mapping[str, Any]], *, cond_embed: bool, guidance_embed: bool) -> None:
        """Check the objective against what the model takes and a batch of every bucket, as a step reads it.

        Raises: UserError, see `ConditionMix.check`; and for a model that wants a guidance scale and gets none.
        """
        if guidance_embed and self.guidance is None:
            raise UserError("the model has guidance_embed=True: set --config.guidance=4.0, or another scale")
        self.mix.check(examples, cond_embed=cond_embed)

    def draw(self, batch: Batch, key: Array) -> Draws:
        """Returns the draws of a key."""
        key_time, key_noise, key_text = jax.random.split(key, 3)
        rows, logit_normal = len(batch["latent"]), self.flow.time_sampling == "logit_normal"
        shift = self.shift(batch["latent"].shape)
        t = flow.sample_time(key_time, rows, shift, logit_normal=logit_normal, stratified=self.flow.stratified)
        noise = jax.random.normal(key_noise, batch["latent"].shape, jnp.float32)
        chances = zip(jax.random.split(key_text), (self.dropout_ratio.t5, self.dropout_ratio.clip), strict=True)
        return Draws(t, noise, *(jax.random.bernoulli(key, chance, (rows,)) for key, chance in chances))

    def shift(self, shape: tuple[int, ...]) -> float:
        """Returns how far times of latents of a shape (BTHWC) move to noise.

        As in the original it counts patches of 2 x 2, also where those of the model are smaller.
        """
        _, frames, height, width, _ = shape
        return flow.shift_alpha(height * width // 4, frames) if self.flow.flow_shift is None else self.flow.flow_shift

    def inputs(self, batch: Batch, draws: Draws) -> Inputs:
        """Returns what the denoiser is given."""
        latent = _float32(batch["latent"])  # caches may hold bfloat16: noise and target keep all their bits
        null = self.null.padded(batch["text"].shape[1])
        return Inputs(
            flow.interpolate(latent, draws.noise, draws.t),
            draws.t,
            jnp.where(draws.without_t5[:, None, None], null, batch["text"]),
            jnp.where(draws.without_clip[:, None], self.null.pooled, batch["pooled"]),
            self.condition(batch),
            None if self.guidance is None else jnp.full(len(latent), self.guidance, jnp.float32),
        )

    def condition(self, batch: Batch) -> Float[Array, "B T H W M"] | None:
        """Returns mask and masked reference, None where nothing is ever shown."""
        if CONDITION not in batch:
            return None
        latent = _float32(batch["latent"])
        given = {name: _float32(batch[name]) for name in self.mix.references(latent.shape[1])}
        return drawn_conditions.condition(batch[CONDITION], latent, given, self.mix.is_causal)

    def learnt_frames(self, batch: Batch) -> Float[Array, "B T"] | None:
        """Returns the weights of latent frames in the loss, None where all count alike."""
        if not self.no_i2v_ref_loss or CONDITION not in batch:
            return None
        mask = drawn_conditions.masks(batch[CONDITION], batch["latent"].shape[1], self.mix.is_causal)
        return drawn_conditions.learnt_frames(mask)


def _float32(array: Array) -> Float[Array, "..."]:
    return array.astype(jnp.float32)
