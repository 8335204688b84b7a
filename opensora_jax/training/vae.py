"""The training objective of an autoencoder: error of pixels, perceptual distance, divergence of the latent.

Source: hpcaitech/Open-Sora, `opensora/models/vae/losses.py`, whose sums are `reduction="sum"` here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from opensora_jax.models.codec import to_pixels
from opensora_jax.models.posterior import Posterior
from opensora_jax.training.accumulate import Batch, Metrics

Distance = Callable[[Array, Array], Array]  # of two videos, frame by frame


@dataclass(frozen=True)
class VAELossConfig:
    """Weights of the terms, and what they are weights of.

    With the reduction "mean" the error is a mean over pixels and the divergence one over latent values. "sum" is the
    original's: the error, and the distance and `logvar_init` for every value, summed over a frame, the divergence over
    all that a posterior counts as one. `logvar_init` is the log variance of pixels; no optimiser owns it there either.
    """

    l1_loss_weight: float
    l2_loss_weight: float
    kl_loss_weight: float
    perceptual_loss_weight: float = 0.0  # of LPIPS
    logvar_init: float = 0.0
    reduction: Literal["mean", "sum"] = "mean"


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


@dataclass(frozen=True, eq=False)
class VAELoss:
    """The loss of an autoencoder on batches of `video` bytes; single frames are images.

    `lpips` is needed where the perceptual distance has a weight.
    """

    config: VAELossConfig
    lpips: Distance | None = None

    def draw(self, batch: Batch, key: Array) -> Array:
        """Returns a key for each sample, by which the posterior draws its latent."""
        return jax.random.split(key, len(batch["video"]))

    def __call__(self, model: nnx.Module, batch: Batch, draws: Array) -> tuple[Array, Metrics]:
        """Returns error and divergence of a batch, with their parts as metrics."""
        video = to_pixels(batch["video"])
        if video.shape[1] == 1:
            model = only_current_frame_learns(model)
        posterior = model.posterior(video)  # type: ignore[attr-defined]
        reconstruction = model.reconstruct(posterior.sample(draws))  # type: ignore[attr-defined]
        config = self.config
        apart = getattr(model, "frames_apart", False)
        error, kl, metrics = measure(
            config, video, reconstruction, posterior, self.lpips, config.logvar_init, frames_apart=apart
        )
        return error + kl, metrics | {"psnr_db": 10 * jnp.log10(4 / metrics["l2"])}


def measure(
    config: VAELossConfig,
    video: Float[Array, "B T H W 3"],
    reconstruction: Float[Array, "B T H W 3"],
    posterior: Posterior | None,
    lpips: Distance | None,
    logvar: Float[Array, ""] | float,
    *,
    frames_apart: bool = False,
) -> tuple[Float[Array, ""], Float[Array, ""] | float, Metrics]:
    """Returns the negative log likelihood of the video, the weighted divergence, and the terms as means.

    Without a posterior the divergence is 0. With `frames_apart` every frame has a posterior of its own.
    """
    difference = reconstruction - video
    metrics = {"l1": jnp.abs(difference).mean(), "l2": jnp.square(difference).mean()}
    error = config.l1_loss_weight * metrics["l1"] + config.l2_loss_weight * metrics["l2"]
    if config.perceptual_loss_weight and lpips is not None:
        metrics["perceptual"] = lpips(video, reconstruction).mean()
        error += config.perceptual_loss_weight * metrics["perceptual"]
    likelihood = error / jnp.exp(logvar) + logvar
    summed = config.reduction == "sum"
    likelihood = likelihood * video[0, 0].size if summed else likelihood
    if posterior is None:
        return likelihood, 0.0, metrics
    metrics["kl"] = posterior.kl().sum() / posterior.mean.size
    kl = config.kl_loss_weight * metrics["kl"]
    values = posterior.mean[0, 0].size if frames_apart else posterior.mean[0].size
    return likelihood, kl * values if summed else kl, metrics
