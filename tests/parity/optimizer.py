"""Drivers for what turns gradients into parameters: AdamW's updates, the curves of the rate, the moving average."""

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from opensora_jax.training.optimizer import OptimConfig, Optimizer, cosine_with_warmup, linear_warmup, make_optimizer
from opensora_jax.training.state import divide, join, moved
from tests.parity.golden import Golden, Tolerance

FROZEN = ("1", "bias")
GROUPS = {"eps1e-15": (5e-5, 1e-15, 0.0), "wd": (1e-3, 1e-8, 0.1)}  # lr, eps and weight decay, as the json words them


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Returns the largest difference, each over its own reference value; both may be 0."""
    return float((np.abs(ours - theirs) / np.where(theirs == 0, 1e-12, np.abs(theirs))).max(initial=0))


def adam(golden: Golden) -> None:
    """Drive `adam_update`: four updates with the epsilon of the training configs, and with weight decay."""
    for group, (lr, eps, weight_decay) in GROUPS.items():
        inputs = golden.part(f"in/{group}/")
        optimizer = adamw(lr, eps, weight_decay)
        params = jnp.asarray(inputs["p0"])
        state = optimizer.init(params)
        for step in range(4):
            grads = inputs[f"grad{step + 1}"]
            params, state = optimizer.update(grads, optax.tree.norm(grads), state, params, jnp.int32(step))
            golden.compare(f"out/{group}/p{step + 1}", params, Tolerance(1e-5, relative))


def adamw(lr: float, eps: float, weight_decay: float) -> Optimizer:
    """Returns AdamW at a constant rate, without clipping."""
    config = OptimConfig(
        cls="adamw",
        lr=lr,
        betas=(0.9, 0.999),
        eps=eps,
        weight_decay=weight_decay,
        grad_clip=float("inf"),
        warmup_steps=0,
        lr_schedule="constant",
        moments_dtype="float32",
        freeze=(),
    )
    return make_optimizer(config, 4)


def schedules(golden: Golden) -> None:
    """Drive `lr_schedules`: after its last step a cosine rises again there, and stays here."""
    for name, row in golden.rows(
        "curves", ["kind", "base_lr", "initial_lr", "warmup_steps", "total_steps", "eta_min", "note"]
    ):
        if row["kind"] == "linear_warmup":
            rate = linear_warmup(row["base_lr"], row["initial_lr"], row["warmup_steps"])
        else:
            rate = cosine_with_warmup(row["base_lr"], row.get("eta_min", 0.0), row["warmup_steps"], row["total_steps"])
        theirs = np.asarray(golden.take(f"{name}.lr_used_at_step"))
        ours = np.asarray(rate(jnp.arange(len(theirs))))
        last = row.get("total_steps", len(theirs) - 1)
        expected = np.where(np.arange(len(theirs)) > last, theirs[last], theirs)
        golden.check(f"{name}.lr_used_at_step", ours, expected, Tolerance(1e-6, relative))


def average(golden: Golden) -> None:
    """Drive `ema`: three steps at two decays, one parameter frozen."""
    steps = [tree(golden.part(f"in/model_step{step}/")) for step in range(3)]
    start = tree(golden.part("in/ema0/"))
    for decay in (0.9, 0.9999):
        ema, frozen = divide(start, {FROZEN})
        for params in steps:
            ema = moved(ema, divide(params, {FROZEN})[0], decay)
        for path, leaf in nnx.to_flat_state(join(ema, frozen)):
            golden.compare(f"out/ema_after3_decay{decay}/{'.'.join(path)}", leaf[...], Tolerance(1e-6, relative))


def tree(tensors: dict[str, np.ndarray]) -> nnx.State:
    """Returns a state dict as the parameters of a module."""
    return nnx.from_flat_state([(tuple(name.split(".")), nnx.Param(jnp.asarray(t))) for name, t in tensors.items()])
