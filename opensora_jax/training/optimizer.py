"""The optimiser of a run: warmup, schedule, clipping and AdamW or Muon, from one config section."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon


@dataclass(frozen=True)
class OptimConfig:
    """Names as in the original's `optim`; `lr_schedule` after the warmup is constant or a cosine to zero."""

    cls: Literal["adamw", "muon"]
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    grad_clip: float
    warmup_steps: int
    lr_schedule: Literal["constant", "cosine"]


def learning_rate(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Returns the rate at each step: step n of a warmup of w has lr (n + 1) / (w + 1), from 1e-6 up.

    Source: hpcaitech/Open-Sora, `opensora/utils/optimizer.py`.
    """
    first = min(1e-6, config.lr)

    def schedule(step):
        ramp = first + (step + 1) / (config.warmup_steps + 1) * (config.lr - first)
        done = jnp.clip((step - config.warmup_steps) / max(1, num_steps - config.warmup_steps), 0, 1)
        after = config.lr * (0.5 * (1 + jnp.cos(jnp.pi * done)) if config.lr_schedule == "cosine" else 1.0)
        return jnp.where(step < config.warmup_steps, ramp, after)

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


def make_optimizer(config: OptimConfig, num_steps: int) -> optax.GradientTransformation:
    """Returns the optimiser of a run of `num_steps` updates.

    Source for Muon: Jordan et al. 2024, through optax.contrib.
    """
    rate, (b1, b2) = learning_rate(config, num_steps), config.betas
    if config.cls == "muon":
        update = muon(
            rate,
            adam_b1=b1,
            adam_b2=b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=_muon_axes,
        )
    else:
        update = optax.adamw(rate, b1, b2, config.eps, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.grad_clip), update)
