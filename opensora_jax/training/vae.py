"""The training objective of an autoencoder.

Source: hpcaitech/Open-Sora, `opensora/models/vae/losses.py`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, UInt8

from opensora_jax.training.state import Batch, Loss, Metrics


@dataclass(frozen=True)
class VAELossConfig:
    """Weights of the terms; absolute and squared error are means over pixels, the divergence over latent values."""

    l1_loss_weight: float
    l2_loss_weight: float
    kl_loss_weight: float


def to_pixels(video: UInt8[Array, "B T H W 3"]) -> Float[Array, "B T H W 3"]:
    """Returns bytes as pixels in [-1, 1]."""
    return video.astype(jnp.float32) / 127.5 - 1.0


def to_bytes(pixels: Float[Array, "B T H W 3"]) -> UInt8[Array, "B T H W 3"]:
    """Returns pixels in [-1, 1], clipped, as bytes."""
    return jnp.round((jnp.clip(pixels, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


def only_current_frame_learns(model: nnx.Module) -> nnx.Module:
    """Returns the model with every tap of time but the last cut off from gradients.

    All taps see the one frame of an image, so all would learn the same, and videos would blur over time.
    """
    graphdef, params = nnx.split(model)

    def cut(param: Array) -> Array:
        if param.ndim != 5 or len(param) == 1:
            return param
        return jnp.concatenate([jax.lax.stop_gradient(param[:-1]), param[-1:]])

    return nnx.merge(graphdef, jax.tree.map(cut, params))


def make_loss(config: VAELossConfig) -> Loss:
    """Returns `loss(model, batch, key)` for batches of `video` bytes; single frames are images."""

    def loss(model: nnx.Module, batch: Batch, key: Array) -> tuple[Array, Metrics]:
        video = to_pixels(batch["video"])
        if video.shape[1] == 1:
            model = only_current_frame_learns(model)
        posterior = model.posterior(video)  # type: ignore[attr-defined]
        error = model.reconstruct(posterior.sample(key)) - video  # type: ignore[attr-defined]
        l1, l2 = jnp.abs(error).mean(), jnp.square(error).mean()
        kl = posterior.kl().sum() / posterior.mean.size
        total = config.l1_loss_weight * l1 + config.l2_loss_weight * l2 + config.kl_loss_weight * kl
        return total, {"l1": l1, "l2": l2, "kl": kl, "psnr_db": 10 * jnp.log10(4 / l2)}

    return loss
