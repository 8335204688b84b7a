"""Rectified flow: the straight path between data and noise, its velocity, and how times are drawn and shifted.

Time runs from 1 (noise) to 0 (data).
Source: Liu et al. 2022 (arXiv:2209.03003); Esser et al. 2024 (arXiv:2403.03206), section 3.1 for the logit-normal
times; hpcaitech/Open-Sora, `opensora/utils/sampling.py` and `scripts/diffusion/train.py` for the shift.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

SIGMA_MIN = 1e-5


def per_sample(t: Float[Array, "B"], x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """Returns `t` with trailing axes of size 1, to multiply `x`."""
    return t.reshape(t.shape + (1,) * (x.ndim - 1))


def interpolate(x0: Float[Array, "B ..."], noise: Float[Array, "B ..."], t: Float[Array, "B"]) -> Float[Array, "B ..."]:
    """Returns the point at time `t` between data and noise; a trace of noise remains in data (1e-5)."""
    t = per_sample(t, x0)
    return (1 - t) * x0 + (1 - (1 - SIGMA_MIN) * (1 - t)) * noise


def target(x0: Float[Array, "..."], noise: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the velocity dx/dt of `interpolate`, the same at every time."""
    return (1 - SIGMA_MIN) * noise - x0


def shift_alpha(tokens_per_frame: float | int, latent_frames: int) -> float:
    """Returns how far times move to noise: linear in tokens of one frame (256 -> 1, 4096 -> 3) times sqrt(frames)."""
    return (1.0 + (tokens_per_frame - 256) * (3.0 - 1.0) / (4096 - 256)) * math.sqrt(latent_frames)


def time_shift(alpha: float, t):
    """Returns `t` in [0, 1] moved towards 1 for alpha > 1."""
    return alpha * t / (1 + (alpha - 1) * t)


def schedule(num_steps: int, alpha: float) -> Float[np.ndarray, "N"]:
    """Returns the `num_steps + 1` times of a sampling run, from 1 down to 0.

    Counted from the nearer end and shifted in float32, as in the original: its times to the last bit.
    """
    step = float(np.float32(-1) / np.float32(num_steps))
    index = np.arange(num_steps + 1)
    even = np.where(index < (num_steps + 1) // 2, 1 + step * index, -step * (num_steps - index))
    return time_shift(float(alpha), even.astype(np.float32))


def sample_time(key: Array, batch: int, alpha: float, *, logit_normal: bool, stratified: bool) -> Float[Array, "B"]:
    """Returns training times: sigmoid of a normal, or uniform; shifted by `alpha`.

    Stratified times take one draw from each of `batch` equal shares of probability: the same distribution with less
    variance of the loss.
    """
    u = jax.random.uniform(key, (batch,), minval=1e-5, maxval=1 - 1e-5)
    if stratified:
        u = (jnp.arange(batch) + u) / batch
    return logit_normal_time(jax.scipy.stats.norm.ppf(u), alpha) if logit_normal else time_shift(alpha, u)


def logit_normal_time(normal: Float[Array, "B"], alpha: float) -> Float[Array, "B"]:
    """Returns training times made of standard normal numbers: their sigmoid, shifted by `alpha`."""
    return time_shift(alpha, jax.nn.sigmoid(normal))


def loss(
    velocity: Float[Array, "B T H W C"],
    wanted: Float[Array, "B T H W C"],
    frames: Float[Array, "B T"] | None = None,
) -> Float[Array, ""]:
    """Returns the mean squared error against the path's velocity, in float32.

    With weights for the frames it is the mean over samples of each one's weighted mean over its frames.
    """
    error = jnp.square(velocity.astype(jnp.float32) - wanted.astype(jnp.float32))
    if frames is None:
        return jnp.mean(error)
    by_frame = jnp.mean(error, axis=(2, 3, 4))
    return jnp.mean((by_frame * frames).sum(1) / frames.sum(1))
