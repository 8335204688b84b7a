"""What sampling is made of: times, tokens, masks, and the inputs that trajectories and whole runs share.

The original always runs three branches stacked on the batch axis, [text; negative; negative]. Its fake text encoders
give the two negative thirds different embeddings; then both null branches are run here too.
"""

import re
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from opensora_jax.diffusion import conditions, flow, guidance
from opensora_jax.diffusion.guidance import GuidanceConfig
from opensora_jax.diffusion.sampler import Prompt, Velocity
from opensora_jax.models.mmdit import MMDiT
from opensora_jax.nn.embed import patchify
from tests.parity.golden import EXACT, Golden, Tolerance, absolute, channels_first, channels_last

TRAJECTORY = Tolerance(2e-4)
TIMES = Tolerance(1e-7, absolute)
BRANCHES = ("cond", "uncond_text", "uncond")
PREPARED = re.compile(r"(out/prepare(?:_ids)?_p(\d+))_img$")


def schedules(golden: Golden) -> None:
    """Drive `schedules`: times, their shift, its size, and guidance that oscillates."""
    fields = ("num_steps", "image_seq_len", "num_frames", "shift_alpha", "shift")
    for name, row in golden.rows("get_schedule", fields):
        times = flow.schedule(row["num_steps"], alpha_of(row, row["image_seq_len"], row["num_frames"]))
        golden.compare(f"{name}.timesteps", times, TIMES)
    for name, row in golden.rows("time_shift", ["alpha", "t"]):
        golden.compare(f"{name}.out", flow.time_shift(row["alpha"], np.float32(row["t"])), TIMES)
    for name, row in golden.rows("get_res_lin_function", ["x"]):
        golden.compare(f"{name}.y", flow.shift_alpha(row["x"], 1), TIMES)
    for name, row in golden.rows("get_oscillation_gs", ["guidance", "i", "force_num"]):
        with mock.patch.object(guidance, "STEADY_STEPS", row["force_num"]):
            golden.compare(f"{name}.out", guidance.oscillating(row["guidance"], row["i"], True), TIMES)


def packing(golden: Golden) -> None:
    """Drive `pack_prepare`: latents as tokens, tiled over prompts, with positions."""
    inputs = golden.part("in/")
    for name in [name for name in golden.values if name.startswith("out/packed_p")]:
        patch = int(name.rsplit("_p", 1)[1])
        golden.compare(name, patchify(channels_last(inputs[f"x_p{patch}"]), patch))
    for prefix, patch in {(match[1], int(match[2])) for name in golden.values if (match := PREPARED.match(name))}:
        rows = len(golden.values[f"{prefix}_img"])  # prepare makes as many latents as there are prompts
        x, text = channels_last(inputs[f"x_p{patch}"]), jnp.asarray(inputs[f"t5_p{patch}"])[:rows]
        x = jnp.concatenate([x] * (rows // len(x)))  # as the sampler stacks branches
        channels = x.shape[-1] * patch**2
        seen = pack(SimpleNamespace(patch_size=patch, in_channels=channels), x, text, None)
        golden.compare_found({f"{prefix}_{field}": value for field, value in seen.items()}, EXACT)
        golden.compare(f"{prefix}_y_vec", inputs[f"clip_p{patch}"][:rows])  # passed on as it is


def pack(config: Any, x: Array, text: Array, condition: Array | None) -> dict[str, Array]:
    """Returns the tokens and positions that MMDiT makes of latents and text, without running it."""
    seen: dict[str, Array] = {}

    def look(img, ids, txt, t, pooled, cond, strength):
        ids = np.broadcast_to(ids, (len(img), *ids.shape)).astype(np.float32)
        seen.update(img=img, txt=txt, cond=cond, txt_ids=ids[:, : txt.shape[1]], img_ids=ids[:, txt.shape[1] :])
        return img

    fake = SimpleNamespace(config=config, cond_in=None if condition is None else True, tokens=look)
    zeros = jnp.zeros((len(x), 1))
    MMDiT.__call__(fake, x, zeros[:, 0], text, zeros, condition)
    return seen


def masks(golden: Golden) -> None:
    """Drive `inference_condition`: mask and masked reference of every condition, causal or not."""
    inputs = golden.part("in/")
    batch, channels, frames, height, width = inputs["z"].shape
    for name in [name for name in golden.values if name.startswith("out/mask_")]:
        cond_type, kind = re.fullmatch(r"out/mask_(.+?)_(causal|uncausal|T1|single_video_ref)", name).groups()
        source = _reference_names(cond_type, kind)
        given = [[channels_last(inputs[f"{one}_{i}"]) for one in source] for i in range(batch)]
        shape = (batch, 1 if kind == "T1" else frames, height, width, channels)
        mask, reference = conditions.condition(cond_type, given if source else None, shape, kind != "uncausal")
        theirs = np.broadcast_to(golden.take(name), (batch, 1, *shape[1:4]))  # stored with H = W = 1
        golden.check(name, channels_first(mask), theirs)
        golden.compare(name.replace("mask_", "masked_ref_"), channels_first(reference))


def _reference_names(cond_type: str, kind: str) -> list[str]:
    if cond_type == "t2v":
        return []
    if cond_type.startswith("v2v") or kind == "single_video_ref":
        return ["video_ref"]
    return ["image_ref_a", "image_ref_b"] if cond_type == "i2v_loop" else ["image_ref_a"]


@cache
def velocity(graphdef: nnx.GraphDef) -> Velocity:
    """Returns the network as the function that the sampler calls; one object, so one compile, for each network."""

    def run(params, x, t, text, pooled, condition, guidance):
        return nnx.merge(graphdef, params)(x, t, text, pooled, condition, guidance)

    return run


def branch_prompts(inputs: dict[str, np.ndarray]) -> dict[str, Prompt]:
    """Returns the thirds of the text inputs by branch."""
    thirds = zip(*(np.split(inputs[name], 3) for name in ("txt", "y_vec")), strict=True)
    return {name: Prompt(jnp.asarray(text), jnp.asarray(y)) for name, (text, y) in zip(BRANCHES, thirds, strict=True)}


def read_references(inputs: dict[str, np.ndarray], batch: int) -> list[list[Array]] | None:
    """Returns the reference latents `ref_i_j` of every sample i, None if there are none."""
    names = [sorted((n for n in inputs if n.startswith(f"ref_{i}_")), key=_number) for i in range(batch)]
    return [[channels_last(inputs[name]) for name in sample] for sample in names] if all(names) else None


def _number(name: str) -> int:
    return int(name.rsplit("_", 1)[1])


def scales_of(about: dict[str, Any]) -> GuidanceConfig:
    """Returns the scales and oscillations of a case."""
    flags = ("guidance", "guidance_img", "text_osci", "image_osci", "scale_temporal_osci")
    return GuidanceConfig(*(about[name] for name in flags))


def one_null(inputs: dict[str, np.ndarray]) -> bool:
    """Returns whether both negative thirds read the same text."""
    thirds = [np.split(inputs[name], 3) for name in ("txt", "y_vec")]
    return all(np.array_equal(part[1], part[2]) for part in thirds)


def alpha_of(about: dict[str, Any], tokens: int, frames: int) -> float:
    """Returns the shift of a case: given, or by the tokens of one frame and the latent frames."""
    given = about.get("shift_alpha") if "shift_alpha" in about else about.get("flow_shift")
    if not about.get("shift", True):
        return 1.0
    return flow.shift_alpha(tokens, frames) if given is None else given


def needed_passes(about: dict[str, Any], frames: int, one_null: bool) -> int:
    """Returns how many branches change the result, by the original's formula on unit vectors."""
    scales, steps = scales_of(about), about["num_steps"]
    count = 0
    for i in range(steps):
        odd = i >= 10 and i % 2 == 1
        text = 1.0 if scales.text_osci and odd else scales.guidance
        image = np.full(frames, 1.0 if scales.image_osci and odd else scales.guidance_img or 1.0, np.float32)
        if image[0] > 1 and scales.scale_temporal_osci and about["cond_type"].startswith("i2v"):
            image = np.linspace(1, np.linspace(image[0], 1, steps + 1)[i], frames, dtype=np.float32)
        shares = [u2 + image * (u1 - u2) + text * (c - u1) for c, u1, u2 in np.eye(3, dtype=np.float32)]
        if one_null and (about["cond_type"] == "t2v" or frames == 1):
            shares = [shares[0], shares[1] + shares[2]]
        count += sum(bool(np.abs(share).max() > 1e-6) for share in shares)
    return count
