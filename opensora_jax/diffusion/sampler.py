"""Euler integration from noise (t = 1) to latents (t = 0) under a guidance plan.

The sampler sees a velocity function and arrays, never a model. The branches a step needs are stacked on the
batch axis and run as one forward pass; each set of branches is compiled once, so a schedule with oscillation
compiles two programs and then alternates between them.
Source: Open-Sora 2.0, `opensora/utils/sampling.py`.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import Array
from jaxtyping import Float

from opensora_jax.diffusion.guidance import StepGuidance

Progress = Callable[[Iterable], Iterable]
# (params, x_BTHWC, t_B, text_BSD, pooled_BP, condition_BTHWM | None, guidance_B | None) -> velocity_BTHWC
Velocity = Callable[..., Array]


class Prompt(NamedTuple):
    """Embedded text of a batch: token embeddings and one pooled vector each."""

    text: Float[Array, "B S D"]
    pooled: Float[Array, "B P"]


def branch_prompts(prompt: Prompt, null_prompt: Prompt) -> dict[str, Prompt]:
    """Returns what each branch of classifier-free guidance reads."""
    return {"cond": prompt, "uncond_text": null_prompt, "uncond": null_prompt}


def denoise(
    velocity: Velocity,
    params: Any,
    noise: Float[Array, "B T H W C"],
    times: Float[np.ndarray, "_"],
    plan: list[StepGuidance],
    *,
    prompts: Mapping[str, Prompt],
    condition: Float[Array, "B T H W M"] | None,
    guidance: float | None = None,
    progress: Progress = iter,
) -> Float[Array, "B T H W C"]:
    """Returns latents after one Euler step per entry of `plan`.

    `times` falls from 1 to 0 and has one entry more than `plan`. `prompts` holds one for each branch of the
    plan (`branch_prompts`). `condition` is the mask and the masked reference on the channel axis (None for a
    model without that input). `guidance` goes to models that take it as an input. `progress` wraps the loop,
    for instance in tqdm. `velocity` is a compile-time key: pass the same function object for every batch.
    Raises: ValueError if the lengths of times and plan do not fit.
    """
    if len(times) != len(plan) + 1:
        raise ValueError(f"{len(plan)} steps need {len(plan) + 1} times, got {len(times)}.")
    x = jnp.asarray(noise, jnp.float32)
    for step, now, then in progress(list(zip(plan, times[:-1], times[1:], strict=True))):
        inputs = (jnp.asarray(step.weights), jnp.float32(now), jnp.float32(then))
        x = _euler(velocity, step.branches, params, x, *inputs, prompts, condition, guidance)
    return x


@partial(jax.jit, static_argnums=(0, 1))
def _euler(velocity, branches, params, x, weights, now, then, prompts, condition, guidance):
    stacked = Prompt(*(jnp.concatenate(part) for part in zip(*(prompts[b] for b in branches), strict=True)))
    if condition is not None:
        condition = jnp.concatenate([condition * (b != "uncond") for b in branches])
    x_all = jnp.concatenate([x] * len(branches))
    t = jnp.full(len(x_all), now)
    guidance_all = None if guidance is None else jnp.full(len(x_all), guidance)
    v = velocity(params, x_all, t, stacked.text, stacked.pooled, condition, guidance_all)
    v = rearrange(v.astype(jnp.float32), "(N B) T H W C -> N B T H W C", N=len(branches))
    weights = rearrange(weights, "N T -> N 1 T 1 1 1")  # not an einsum: a TPU would round it to bfloat16
    return x + (then - now) * (weights * v).sum(0)
