"""The training objective of the denoiser: rectified flow on latents with text dropped at random.

Source: hpcaitech/Open-Sora, `scripts/diffusion/train.py`.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from opensora_jax.diffusion import flow
from opensora_jax.training.state import Batch, Loss, Metrics


@dataclass(frozen=True)
class DropoutRatio:
    """Probability of replacing the text by the null text, for each encoder alone and independently."""

    t5: float
    clip: float


@dataclass(frozen=True)
class FlowConfig:
    """How training times are drawn; `flow_shift` replaces the shift that follows from the latent's size."""

    time_sampling: Literal["logit_normal", "uniform"]
    stratified: bool
    flow_shift: float | None


class NullText(NamedTuple):
    """Embeddings of the empty caption."""

    text: Float[Array, "S E"]
    pooled: Float[Array, "P"]


def drop_text(batch: Batch, null: NullText, ratio: DropoutRatio, key: Array) -> tuple[Array, Array]:
    """Returns text and pooled embeddings, each row of each replaced by the null text with its own probability."""
    key_t5, key_clip = jax.random.split(key)
    rows = batch["text"].shape[0]
    without_t5 = jax.random.bernoulli(key_t5, ratio.t5, (rows, 1, 1))
    without_clip = jax.random.bernoulli(key_clip, ratio.clip, (rows, 1))
    return jnp.where(without_t5, null.text, batch["text"]), jnp.where(without_clip, null.pooled, batch["pooled"])


def make_loss(config: FlowConfig, ratio: DropoutRatio, null: NullText) -> Loss:
    """Returns `loss(model, batch, key)` for batches of `latent` (BTHWC), `text` (BSE) and `pooled` (BP)."""

    def loss(model: nnx.Module, batch: Batch, key: Array) -> tuple[Array, Metrics]:
        key_time, key_noise, key_text = jax.random.split(key, 3)
        x0 = batch["latent"]
        _, frames, height, width, _ = x0.shape
        # The original counts patches of 2x2 here even for models with patch 1.
        shift = flow.shift_alpha(height * width // 4, frames) if config.flow_shift is None else config.flow_shift
        logit_normal = config.time_sampling == "logit_normal"
        t = flow.sample_time(key_time, len(x0), shift, logit_normal=logit_normal, stratified=config.stratified)
        noise = jax.random.normal(key_noise, x0.shape, x0.dtype)
        text, pooled = drop_text(batch, null, ratio, key_text)
        velocity = model(flow.interpolate(x0, noise, t), t, text, pooled)
        return flow.loss(velocity, x0, noise), {}

    return loss
