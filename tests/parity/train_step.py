"""The training objective: visual conditions, the masked loss, and whole steps with the original's draws.

Everything goes through what the train command uses, encoders in front of the step included; only networks whose
results a case gives are fakes.
"""

import random
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce
from flax import nnx
from jax import Array

from opensora_jax.diffusion import drawn_conditions, flow
from opensora_jax.diffusion.drawn_conditions import NAMES
from opensora_jax.models.codec import Codec
from opensora_jax.nn.embed import patchify, unpatchify
from opensora_jax.parallel.mesh import one_device
from opensora_jax.training.conditions import CONDITION, ConditionMix
from opensora_jax.training.diffusion import Draws, DropoutRatio, FlowConfig, Inputs, NullText, Objective
from opensora_jax.training.encoders import Encoders, VideoEncoder
from opensora_jax.weights.params import export_params
from tests.parity import mmdit
from tests.parity.golden import EXACT, Golden, Tolerance, absolute, channels_first, channels_last
from tests.parity.sampling import pack

INPUT = Tolerance(1e-5, absolute)
LOSS = Tolerance(1e-4)
MASKED_LOSS = Tolerance(1e-5)
GRADIENT = Tolerance(2e-4)
GUIDANCE = 4.0  # of the original, where a config says nothing
TIME_STRIDE = 4


class FakeAutoencoder:
    """Means over groups of frames and squares of pixels, as `fake_encoder` of the cases says."""

    def __init__(self, about: dict[str, Any], is_causal: bool):
        self.latent_channels, self.space = about["fake_latent_channels"], about["fake_spatial_ratio"]
        self.strides, self.is_causal = (TIME_STRIDE, self.space, self.space), is_causal

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Returns (frames, height, width) of a latent."""
        return (frames - 1) // TIME_STRIDE + 1, height // self.space, width // self.space

    def encode(self, video: Array, keys: Array | None = None) -> Array:
        """Returns the latent."""
        pooled = reduce(video, "B T (H h) (W w) C -> B T H W C", "mean", h=self.space, w=self.space)
        first = 1 if self.is_causal else 0
        cuts = [*range(first, video.shape[1], TIME_STRIDE)]
        groups = jnp.split(pooled, [cut for cut in cuts if cut], axis=1)
        latent = jnp.stack([group.mean(1) for group in groups], axis=1)
        channel = np.arange(self.latent_channels)
        return latent[..., channel % 3] * (1 + 0.1 * channel) + 0.01 * channel


def visual_condition(golden: Golden) -> None:
    """Drive `visual_condition_*`: latents and conditions of clips, one by one and as the original drew them."""
    is_causal = "uncausal" not in golden.path.stem
    fake, clips = FakeAutoencoder(golden.about, is_causal), golden.part("in/")
    for name in [name for name in golden.values if name.startswith("out/x0_")]:
        if name == "out/x0_random":
            continue
        clip, cond_type, pad = re.fullmatch(r"out/x0_(image|short|long)_(.+?)(_pad)?", name).groups()
        drawn = [cond_type] * len(clips[f"x_{clip}"])
        latent, condition = _encoded(fake, clips[f"x_{clip}"], {cond_type: 1}, drawn, bool(pad))
        golden.compare(name, latent, INPUT)
        if pad and cond_type == "i2v_tail":  # the original shows the seventh frame from the end, and repeats the last
            theirs = golden.take(name.replace("x0_", "cond_"))
            golden.check(f"{name}: mask", condition[:, 0], theirs[:, 0])
        else:
            golden.compare(name.replace("x0_", "cond_"), condition, INPUT)
    _drawn_mix(golden, fake, clips["x_short"])


def _drawn_mix(golden: Golden, fake: FakeAutoencoder, short: np.ndarray) -> None:
    case, clips = golden.about["random_case"], np.concatenate([short] * 3)
    mix = ConditionMix.parse(case["condition_config_before"], fake.is_causal)
    frames, _, _ = fake.latent_shape(*clips.shape[2:])
    golden.check("conditions that fit", set(mix.names(frames)), case["condition_config_after"].keys())
    latent, condition = _encoded(fake, clips, case["condition_config_before"], case["picks"])
    golden.compare("out/x0_random", latent, INPUT)
    golden.compare("out/cond_random", condition, INPUT)


def _encoded(
    fake: FakeAutoencoder, clips: np.ndarray, weights: dict[str, float | int], drawn: list[str], pad: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the latent of clips and their condition, channels first."""
    mix = ConditionMix.parse(weights, fake.is_causal)
    video = _video_encoder(fake, mix, pad)
    batch = _clips(clips) | {CONDITION: _numbers(drawn)}
    batch |= video(batch)
    objective = _objective(mix)
    condition = objective.condition(batch)
    return channels_first(batch["latent"]), channels_first(condition)


def _video_encoder(fake: FakeAutoencoder, mix: ConditionMix, pad: bool = False) -> VideoEncoder:
    codec = Codec(fake, one_device())
    return VideoEncoder(codec, mix, posterior="mode", seed=0, batch_size=64, pad_images=pad)


def _clips(clips: np.ndarray) -> dict[str, Array]:
    return {"video": channels_last(clips), "sample_id": jnp.arange(len(clips)), "step": jnp.int32(0)}


def _numbers(drawn: list[str]) -> Array:
    return jnp.asarray([NAMES.index(name) for name in drawn])


def batch_loss(golden: Golden) -> None:
    """Drive `batch_loss`: the loss with and without the frames that are given."""
    inputs, (frames, height, width) = golden.part("in/"), golden.about["latent"]
    grid = (frames, height // 2, width // 2)
    velocity, wanted = (unpatchify(jnp.asarray(inputs[name]), grid, 2) for name in ("pred", "target"))
    learnt = drawn_conditions.learnt_frames(jnp.asarray(inputs["masks_BT"]))
    golden.compare("out/loss_no_mask", flow.loss(velocity, wanted), MASKED_LOSS)
    golden.compare("out/loss_masked", flow.loss(velocity, wanted, learnt), MASKED_LOSS)
    for i in range(len(velocity)):
        one = slice(i, i + 1)
        found = flow.loss(velocity[one], wanted[one], learnt[one])
        golden.compare(f"out/loss_masked_sample{i}", found, MASKED_LOSS)


def step(golden: Golden) -> None:
    """Drive `train_step_*`: what the model is given, the loss and its gradients."""
    about, given = golden.about, golden.part("in/")
    network, patch = mmdit.load(golden), about["train_cfg"]["patch_size"]
    fake, weights = FakeAutoencoder(about, about["ae_causal"]), about["train_cfg"].get("condition_config", {})
    mix = ConditionMix.parse(weights, fake.is_causal)
    objective = _objective(mix, DropoutRatio(**about["train_cfg"]["dropout_ratio"]), given)
    batch = _batch(golden, fake, mix, weights)
    draws = _draws(objective, batch, given, patch)
    inputs = objective.inputs(batch, draws)
    _compare_inputs(golden, network.config, inputs)
    golden.compare("out/x0_packed", patchify(batch["latent"], patch), INPUT)
    golden.compare("out/target", patchify(flow.target(batch["latent"], draws.noise), patch), INPUT)

    def measure(params: nnx.State) -> Array:
        return objective(nnx.merge(network.graphdef, params), batch, draws)[0]

    loss, by_params = jax.jit(jax.value_and_grad(measure))(network.params)
    golden.compare("out/loss", loss, LOSS)
    gradients = export_params("mmdit", by_params)
    norm = np.sqrt(sum(np.square(value, dtype=np.float64).sum() for value in gradients.values()))
    golden.compare("out/grad_global_norm", norm, LOSS)
    golden.compare_found({f"grad/{name}": value for name, value in gradients.items()}, GRADIENT)


def _objective(
    mix: ConditionMix, ratio: DropoutRatio | None = None, given: dict[str, np.ndarray] | None = None
) -> Objective:
    null = NullText(jnp.zeros((1, 1)), jnp.zeros(1))
    if given is not None:
        null = NullText(jnp.asarray(given["null_txt"][0]), jnp.asarray(given["null_vec"][0]))
    times = FlowConfig("logit_normal", stratified=False, flow_shift=None)
    return Objective(times, ratio or DropoutRatio(0.0, 0.0), null, mix, guidance=GUIDANCE, no_i2v_ref_loss=False)


def _batch(
    golden: Golden, fake: FakeAutoencoder, mix: ConditionMix, weights: dict[str, float | int]
) -> dict[str, Array]:
    """Returns the batch of a step, its conditions as the original drew them, through the encoders."""
    given = golden.part("in/")
    batch = _clips(given["video"]) | {"t5_ids": jnp.zeros((1, 1)), "clip_ids": jnp.zeros((1, 1))}
    if weights:
        draw = random.Random(golden.about["python_random_seed_for_condition"])
        names, shares = list(weights), list(weights.values())
        picks = [draw.choices(names, weights=shares)[0] for _ in given["video"]]
        batch |= {CONDITION: _numbers(picks)}
    t5, clip = (_known_text(given[name]) for name in ("t5_txt", "clip_vec"))
    return Encoders(_video_encoder(fake, mix), t5, clip)(batch)


def _known_text(embeddings: np.ndarray) -> Any:
    return SimpleNamespace(params=None, forward=lambda params, ids: jnp.asarray(embeddings))


def _draws(objective: Objective, batch: dict[str, Array], given: dict[str, np.ndarray], patch: int) -> Draws:
    _, frames, height, width, _ = batch["latent"].shape
    noise = unpatchify(jnp.asarray(given["noise_x1_packed"]), (frames, height // patch, width // patch), patch)
    t = flow.logit_normal_time(jnp.asarray(given["normal_for_t"]), objective.shift(batch["latent"].shape))
    ratio = objective.dropout_ratio
    lost = (given[f"uniform_for_{name}_dropout"] < getattr(ratio, name) for name in ("t5", "clip"))
    return Draws(t, noise, *map(jnp.asarray, lost))


def _compare_inputs(golden: Golden, config: Any, inputs: Inputs) -> None:
    """Compare what the model is given, as the tokens it makes of it."""
    tokens = pack(config, inputs.x, inputs.text, inputs.condition)
    found = {"timesteps": inputs.t, "y_vec": inputs.pooled, "guidance": inputs.guidance}
    exact = {name: tokens.pop(name) for name in ("txt_ids", "img_ids")} | {"txt": tokens.pop("txt")}
    golden.compare_found({f"out/model_in/{name}": value for name, value in exact.items()}, EXACT)
    golden.compare_found({f"out/model_in/{name}": value for name, value in (tokens | found).items()}, INPUT)
