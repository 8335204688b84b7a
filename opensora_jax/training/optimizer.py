"""The optimiser of a run: warmup, schedule, clipping and AdamW or Muon, from one config section.

The rate follows the step of the run, not the number of updates: an update that is left out delays nothing. All of the
arithmetic is in float32.
Source: hpcaitech/Open-Sora, `opensora/utils/optimizer.py`; Loshchilov & Hutter 2019 (arXiv:1711.05101).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array
from optax.contrib import MuonDimensionNumbers, muon

from opensora_jax.models.sizes import check_least
from opensora_jax.training.moments import bfloat16_moments

FIRST_RATE = 1e-6  # a linear warmup starts here


@dataclass(frozen=True)
class OptimConfig:
    """Names as in the original's `optim`; `lr_schedule` after the warmup is constant or a cosine to zero."""

    cls: Literal["adamw", "muon"]
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    grad_clip: float  # largest norm of all gradients together
    warmup_steps: int
    lr_schedule: Literal["constant", "cosine"]
    moments_dtype: Literal["float32", "bfloat16"]  # in which AdamW's two moments are kept between steps
    freeze: tuple[str, ...]  # published names of parameters, or of modules that hold them, that stay as they are

    def __post_init__(self):
        """Checks what the update relies on."""
        if self.moments_dtype != "float32" and self.cls != "adamw":
            raise ValueError(f"moments_dtype={self.moments_dtype!r} is for cls='adamw' alone: got {self.cls!r}.")
        if self.grad_clip <= 0:
            raise ValueError(f"grad_clip is above 0: got {self.grad_clip}; use inf for no clipping.")
        check_least(self, 0, "lr", "eps", "weight_decay", "warmup_steps")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are from 0 to below 1: got {self.betas}.")


@dataclass(frozen=True)
class Optimizer:
    """One update: gradients clipped together, `direction` of rate 1, times the rate of the step."""

    direction: optax.GradientTransformation  # what is subtracted from the parameters
    rate: optax.Schedule
    grad_clip: float

    def init(self, params: Any) -> Any:
        """Returns the state that goes with `params`: zeros."""
        return self.direction.init(params)

    def update(self, grads: Any, norm: Array, state: Any, params: Any, step: Array) -> tuple[Any, Any]:
        """Returns the parameters and the state after `step`; `norm` is that of all gradients together."""
        share = jnp.minimum(1.0, self.grad_clip / norm)
        direction, state = self.direction.update(jax.tree.map(lambda g: share * g, grads), state, params)
        rate = jnp.asarray(self.rate(step), jnp.float32)
        return jax.tree.map(lambda p, d: p - rate * d, params, direction), state


def make_optimizer(config: OptimConfig, num_steps: int) -> Optimizer:
    """Returns the optimiser of a run of `num_steps` steps.

    Source for Muon: Jordan et al. 2024, through optax.contrib.
    """
    b1, b2 = config.betas
    if config.cls == "muon":
        direction = muon(
            -1.0,  # optax multiplies by minus the rate
            adam_b1=b1,
            adam_b2=b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=_muon_axes,
        )
    else:
        adam = optax.scale_by_adam(b1, b2, config.eps)
        adam = bfloat16_moments(adam) if config.moments_dtype == "bfloat16" else adam
        direction = optax.chain(adam, optax.add_decayed_weights(config.weight_decay))
    return Optimizer(direction, learning_rate(config, num_steps), config.grad_clip)


def learning_rate(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Returns the rate at each step, counted from 0."""
    if config.lr_schedule == "cosine":
        return cosine_with_warmup(config.lr, 0.0, config.warmup_steps, num_steps)
    return linear_warmup(config.lr, min(FIRST_RATE, config.lr), config.warmup_steps)


def linear_warmup(lr: float, first: float, warmup: int) -> optax.Schedule:
    """Returns the rate that moves from `first` to `lr` in `warmup + 1` equal parts, and stays there."""
    return lambda step: first + jnp.minimum((step + 1) / (warmup + 1), 1.0) * (lr - first)


def cosine_with_warmup(lr: float, last: float, warmup: int, total: int) -> optax.Schedule:
    """Returns the rate that is `lr` at the end of the warmup, falls as half a cosine to `last` at `total`, and stays.

    One step after the warmup, not at its end, the cosine passes `lr`: the first of its rates lies above it, by 0.2% if
    32 steps follow the warmup. The original's schedule, made of two of PyTorch's, does the same.
    """
    length = max(2, total - warmup)
    height = (lr - last) / math.cos(math.pi / (2 * length)) ** 2

    def schedule(step: Array | int) -> Array:
        left = jnp.clip((total - step) / length, 0.0, 1.0)
        fall = last + height * jnp.sin(math.pi / 2 * left) ** 2  # 1 + cos, without the cancellation near the end
        return jnp.where(step < warmup, lr * (step + 1) / max(1, warmup), fall)

    return schedule


def _muon_axes(params: Any) -> Any:
    """Kernels are orthogonalised as (all inputs) x (outputs), scanned layers one by one; all else goes to Adam.

    A kernel of three axes is that of scanned linear layers; one of five is a convolution.
    """

    def axes(path: tuple, leaf: Any) -> MuonDimensionNumbers | None:
        if "kernel" not in jax.tree_util.keystr(path):
            return None
        first = 1 if leaf.ndim == 3 else 0
        return MuonDimensionNumbers(tuple(range(first, leaf.ndim - 1)), leaf.ndim - 1)

    return jax.tree.map_with_path(axes, params)
