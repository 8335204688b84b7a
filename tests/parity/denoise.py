"""Trajectories: what model and sampler make of the inputs, every step of the sampler on its own, then the whole run."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from opensora_jax.diffusion import conditions, flow
from opensora_jax.diffusion.guidance import StepGuidance, count_passes, plan_distilled, plan_steps
from opensora_jax.diffusion.sampler import Prompt, Velocity, denoise
from opensora_jax.nn.embed import patchify
from tests.parity import mmdit
from tests.parity.golden import EXACT, Golden, channels_first, channels_last
from tests.parity.sampling import (
    TIMES,
    TRAJECTORY,
    alpha_of,
    branch_prompts,
    needed_passes,
    one_null,
    pack,
    read_references,
    scales_of,
    velocity,
)


class Setting(NamedTuple):
    """What one sampling run is made of."""

    network: mmdit.Network
    velocity: Velocity
    noise: Array
    times: np.ndarray
    plan: list[StepGuidance]
    prompts: dict[str, Prompt]
    condition: Array | None  # mask and masked reference
    guidance: float | None  # as an input of the model


def trajectory(golden: Golden) -> None:
    """Drive `denoise_*`: every step on its own, then the whole run."""
    about, inputs = golden.about, golden.part("in/")
    run = _setting(golden)
    golden.check("in/timesteps", run.times, inputs["timesteps"], TIMES)
    _check_packing(golden, run)
    before = _steps(run)
    final = denoise(run.velocity, *_start(run), run.times, run.plan, **_inputs(run))
    patch = run.network.config.patch_size
    found = {
        "out/final_packed": patchify(final, patch),
        "out/final_latent": channels_first(final),
        "out/img_before_each_step": np.stack([patchify(x, patch) for x in before[:-1]]),
    }
    if predictions := {"out/pred_each_step", "out/pred_each_step_3branches"} & golden.left:
        found[predictions.pop()] = _predictions(run, before)
    golden.compare_found(found, TRAJECTORY)
    golden.compare_found({"out/t_vec_each_step": run.times[:-1]}, TIMES)
    if "cond_type" in about:
        golden.check("passes", count_passes(run.plan), needed_passes(about, run.noise.shape[1], one_null(inputs)))


def _setting(golden: Golden) -> Setting:
    about, inputs = golden.about, golden.part("in/")
    network = mmdit.load(golden)
    noise = channels_last(inputs["z"])
    batch, frames, height, width, _ = noise.shape
    steps, tokens = about["num_steps"], height * width // network.config.patch_size**2
    times = flow.schedule(steps, alpha_of(about, tokens, frames))
    strength = about["guidance"] if network.config.guidance_embed else None
    if "cond_type" not in about:
        prompts = {"cond": Prompt(jnp.asarray(inputs["txt"]), jnp.asarray(inputs["y_vec"]))}
        plan = plan_distilled(steps, frames)
        return Setting(network, velocity(network.graphdef), noise, times, plan, prompts, None, strength)
    plan = plan_steps(scales_of(about), steps, about["cond_type"], frames, one_null_prompt=one_null(inputs))
    name, references = about["cond_type"], read_references(inputs, batch)
    mask, reference = conditions.condition(name, references, noise.shape, about["is_causal_vae"])
    golden.check("in/masks", channels_first(mask), inputs["masks"])
    golden.check("in/masked_ref", channels_first(reference), inputs["masked_ref"])
    condition = jnp.concatenate([mask, reference], -1) if network.config.cond_embed else None
    prompts = branch_prompts(inputs)
    return Setting(network, velocity(network.graphdef), noise, times, plan, prompts, condition, strength)


def _start(run: Setting) -> tuple[nnx.State, Array]:
    return run.network.params, run.noise


def _inputs(run: Setting) -> dict[str, Any]:
    return {"prompts": run.prompts, "condition": run.condition, "guidance": run.guidance}


def _steps(run: Setting) -> list[Array]:
    """Returns the latent before each step, and after the last."""
    params, x = _start(run)
    seen = [x]
    for i in range(len(run.plan)):
        x = denoise(run.velocity, params, x, run.times[i : i + 2], run.plan[i : i + 1], **_inputs(run))
        seen.append(x)
    return seen


def _stacked(run: Setting) -> tuple[Prompt, Array | None]:
    """Returns text and condition of all branches on the batch axis, the last branch with a condition of zeros."""
    prompt = Prompt(*(jnp.concatenate(part) for part in zip(*run.prompts.values(), strict=True)))
    if run.condition is None or len(run.prompts) == 1:
        return prompt, run.condition
    return prompt, jnp.concatenate([run.condition, run.condition, jnp.zeros_like(run.condition)])


def _predictions(run: Setting, before: list[Array]) -> np.ndarray:
    """Returns the velocity of every token in every branch at each step."""
    prompt, condition = _stacked(run)
    rows = len(prompt.pooled)
    strength = None if run.guidance is None else jnp.full(rows, run.guidance)

    @jax.jit
    def predict(params, x, t):
        x = jnp.concatenate([x] * len(run.prompts))
        v = run.velocity(params, x, jnp.full(rows, t), prompt.text, prompt.pooled, condition, strength)
        return patchify(v, run.network.config.patch_size)

    pairs = zip(before[:-1], run.times[:-1], strict=True)
    return np.stack([predict(run.network.params, x, jnp.float32(t)) for x, t in pairs])


def _check_packing(golden: Golden, run: Setting) -> None:
    """Compare what the sampler and the model make of the inputs: tokens, positions, the condition of each branch."""
    inputs, frames = golden.part("in/"), run.noise.shape[1]
    seen: dict[str, Array] = {}

    def look(_, x, t, text, pooled, condition, strength):
        seen.update(pack(run.network.config, x, text, condition))
        return jnp.zeros_like(x)

    step = StepGuidance(tuple(run.prompts), np.ones((len(run.prompts), frames), np.float32))
    with jax.disable_jit():
        denoise(look, *_start(run), run.times[:2], [step], **_inputs(run))
    for name in ("img", "img_ids", "txt_ids"):
        golden.check(f"in/{name}", seen[name], inputs[name])
    if run.condition is not None:
        golden.compare_found({"out/cond_packed_step0": seen["cond"]}, EXACT)
