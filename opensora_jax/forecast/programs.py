"""The programs of a config, ready to be compiled for devices that are not here: training, sampling, decoding.

They are the ones that `train` and `sample` run, made of the same functions on shapes in place of arrays.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from opensora_jax.config.errors import UserError
from opensora_jax.data.plan.buckets import Bucket
from opensora_jax.diffusion.guidance import StepGuidance, plan_distilled, plan_steps
from opensora_jax.diffusion.sampler import Prompt as Text
from opensora_jax.diffusion.sampler import branch_prompts, denoise
from opensora_jax.inference.pipeline import check_batch_sizes
from opensora_jax.inference.request import SamplingOption, latent_shape
from opensora_jax.inference.stage import Network, Stage
from opensora_jax.models import codec
from opensora_jax.models.mmdit import MMDiTConfig
from opensora_jax.nn.lora import LoRAConfig
from opensora_jax.parallel.batch import batch_sharding
from opensora_jax.parallel.mesh import MeshConfig, check_heads, data_shards
from opensora_jax.parallel.rules import param_shardings
from opensora_jax.training.conditions import CONDITION, ConditionMix
from opensora_jax.training.diffusion import DropoutRatio, FlowConfig, NullText, Objective
from opensora_jax.training.flops import forward_flops, training_flops
from opensora_jax.training.optimizer import OptimConfig
from opensora_jax.training.programs import jit_step, options_of
from opensora_jax.training.recipe import Recipe
from opensora_jax.weights.pretrained import AUTOENCODERS, DENOISERS, TEXT_ENCODERS, parse_dtype, parse_model


class Program(NamedTuple):
    """A jitted function and the shapes it is called with; that of a decode is not jitted (`parts.py`)."""

    name: str
    function: Any
    arguments: tuple[Any, ...]
    state: dict[str, Any]  # what lies on the devices: name -> tree
    flops: float  # useful ones, on all devices; 0: those that are counted
    samples: int
    tokens: int  # of the denoiser; 0: none
    options: dict[str, Any]  # of the compiler; the function has them


@dataclass(frozen=True)
class TextLength:
    """Of a config's `t5` section the tokens of a text."""

    max_length: int


@dataclass(frozen=True)
class Length:
    """Of a config's `loop` section what the schedule of the rate follows from."""

    num_steps: int


@dataclass(frozen=True)
class Pixels:
    """Of a config's `dataset` section what sizes follow from."""

    fps_max: float
    spatial_unit: int


@dataclass(frozen=True)
class Stored:
    """Of a config's `encode` section the dtype of the cache; None: that of the models."""

    dtype: str | None


@dataclass(frozen=True)
class TrainSections:
    """What of a config of configs/diffusion/train decides the compiled step."""

    seed: int
    dtype: str
    model: dict[str, Any]
    ae: dict[str, Any]
    t5: TextLength
    dataset: Pixels
    encode: Stored
    bucket_config: dict[str, dict[int, Any]]
    flow: FlowConfig
    condition_config: dict[str, float]
    no_i2v_ref_loss: bool
    guidance: float | None
    dropout_ratio: DropoutRatio
    lora: LoRAConfig | None
    optim: OptimConfig
    accumulation_steps: int
    compiler_options: dict[str, dict[str, Any]]
    ema_decay: float | None
    mesh: MeshConfig
    loop: Length

    @property
    def recipe(self) -> Recipe:
        """The part that decides the step's function."""
        parts = self.model, self.lora, self.optim, self.accumulation_steps, self.compiler_options, self.ema_decay
        return Recipe(self.seed, self.dtype, *parts, self.loop.num_steps)


@dataclass(frozen=True)
class SampleSections:
    """What of a config of configs/diffusion/inference decides the compiled programs."""

    batch_size: int
    decode_batch_size: int
    dtype: str
    cond_type: str
    sampling_option: SamplingOption
    mesh: MeshConfig
    model: dict[str, Any]
    ae: dict[str, Any]
    t5: TextLength
    text_networks: dict[str, Any]  # kind -> fields; they stay on the devices, beside the others

    def __post_init__(self):
        """Refuse batches of nothing."""
        if self.batch_size < 1 or self.decode_batch_size < 1:
            raise ValueError(
                f"batch_size and decode_batch_size are at least 1: got {self.batch_size} and {self.decode_batch_size}."
            )

    @property
    def stage(self) -> Stage:
        """The networks and what they are to do."""
        return Stage(Network("model", self.model), Network("ae", self.ae), self.sampling_option, self.cond_type)


def training_step(sections: TrainSections, bucket: Bucket, mesh: Mesh) -> Program:
    """Returns the training step on a batch of a bucket.

    Raises: UserError for sizes, batches and conditions that the networks or the mesh cannot take.
    """
    network = sections.recipe.network
    objective, batch = training_inputs(sections, bucket, mesh)
    assembled = sections.recipe.assemble(objective, mesh, pretrained=False)
    state, options = assembled.abstract, options_of(mesh, assembled.options)
    parts = {"parameters": state.params, "average": state.ema, "optimiser": state.opt_state, "frozen": state.frozen}
    samples, video, words = len(batch["pooled"]), video_tokens(batch["latent"].shape, network), batch["text"].shape[1]
    return Program(
        "train",
        jit_step(assembled.step, state, options),
        (state, batch, key(mesh)),
        parts | {"batch": batch},
        float(samples * training_flops(network, video, words)),
        samples,
        samples * (video + words),
        options,
    )


def training_inputs(
    sections: TrainSections, bucket: Bucket, mesh: Mesh
) -> tuple[Objective, dict[str, jax.ShapeDtypeStruct]]:
    """Returns the objective and the shapes of a bucket's batch. Raises: UserError, see `training_step`."""
    network, autoencoder = sections.recipe.network, abstract_autoencoder(sections.ae)
    check_heads(network.num_heads, mesh)
    mix = ConditionMix.parse(sections.condition_config, autoencoder.is_causal)
    batch = training_batch(sections, bucket, mix, autoencoder, mesh)
    words = batch["text"].shape[1:]
    null = NullText(np.zeros(words, np.float32), np.zeros(network.vec_in_dim, np.float32))  # type: ignore[arg-type]
    objective = Objective(sections.flow, sections.dropout_ratio, null, mix, sections.guidance, sections.no_i2v_ref_loss)
    objective.check({str(bucket): batch}, cond_embed=network.cond_embed, guidance_embed=network.guidance_embed)
    return objective, batch


def training_batch(
    sections: TrainSections, bucket: Bucket, mix: ConditionMix, autoencoder: Any, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a batch as training reads it from a cache."""
    network, place = sections.recipe.network, batch_sharding(mesh)
    rows = bucket.batch_size * data_shards(mesh) * sections.accumulation_steps
    stored = parse_dtype(sections.encode.dtype or sections.dtype)
    try:
        frames, height, width = autoencoder.latent_shape(bucket.num_frames, bucket.height, bucket.width)
    except ValueError as error:
        raise UserError(f"{bucket}: {error}") from error

    def array(*shape: int, dtype: Any = stored) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=place)

    space = height, width, autoencoder.latent_channels
    if space[2] != network.latent_channels:
        raise UserError(
            f"config.model.in_channels is {network.in_channels}, but the latents of config.ae need "
            f"{space[2] * network.patch_size**2}: use the autoencoder that the model is made for"
        )
    batch = {
        "latent": array(frames, *space),
        "text": array(sections.t5.max_length, network.context_in_dim),
        "pooled": array(network.vec_in_dim),
    }
    if mix.shows_frames:
        batch[CONDITION] = array(dtype=jnp.int32)
        batch |= {name: array(count, *space) for name, count in mix.references(frames).items()}
    return batch


def sampling_steps(sections: SampleSections) -> dict[tuple[str, ...], int]:
    """Returns the sets of branches of guidance, each a program of its own, and in how many steps they run.

    Raises: UserError for what `sample` refuses, whatever the mesh.
    """
    autoencoder = sections.stage.check()
    patch = parse_model(sections.model, DENOISERS, "config.model")[1].patch_size
    shape = latent_shape(sections.sampling_option, sections.cond_type, autoencoder, patch)
    return dict(Counter(step.branches for step in guidance_plan(sections, shape[0])))


def guidance_plan(sections: SampleSections, latent_frames: int) -> list[StepGuidance]:
    """Returns the guidance of every step."""
    option = sections.sampling_option
    if option.method == "distill":
        return plan_distilled(option.num_steps, latent_frames)
    return plan_steps(option.guidance_config, option.num_steps, sections.cond_type, latent_frames)


def sampling_step(sections: SampleSections, branches: tuple[str, ...], mesh: Mesh) -> Program:
    """Returns a step of the sampler that runs these branches. Raises: UserError, see `inference/stage.py`."""
    autoencoder, network = _checked(sections, mesh)
    place, option = batch_sharding(mesh), sections.sampling_option
    shape = latent_shape(option, sections.cond_type, autoencoder, network.patch_size)
    guidance = next(step for step in guidance_plan(sections, shape[0]) if step.branches == branches)
    rows, channels = sections.batch_size, autoencoder.latent_channels

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), jnp.float32, sharding=place)

    text = Text(array(sections.t5.max_length, network.context_in_dim), array(network.vec_in_dim))  # type: ignore[arg-type]
    condition = array(*shape, channels + 1) if network.cond_embed else None
    graph, params = abstract_weights(sections.model, DENOISERS, "config.model", sections.dtype, mesh)
    scale = option.guidance if network.guidance_embed else None

    def velocity(params, x, t, text, pooled, condition, guidance):
        return nnx.merge(graph, params)(x, t, text, pooled, condition, guidance)

    def step(params, x, text, null, condition):
        prompts = branch_prompts(text, null)
        times = np.array([1.0, 0.98], np.float32)
        return denoise(velocity, params, x, times, [guidance], prompts=prompts, condition=condition, guidance=scale)

    latent = array(*shape, channels)
    video, words = video_tokens(latent.shape, network), sections.t5.max_length
    others = abstract_weights(sections.ae, AUTOENCODERS, "config.ae", sections.dtype, mesh)[1]
    beside = {"autoencoder": others, "text encoders": text_weights(sections, mesh)}
    return Program(
        f"sample, {' + '.join(branches)}",
        jax.jit(step),
        (params, latent, text, text, condition),
        {"parameters": params} | beside | {"batch": (latent, text, text, condition)},
        float(rows * len(branches) * forward_flops(network, video, words)),
        rows,
        rows * len(branches) * (video + words),
        {},
    )


def decode(sections: SampleSections, mesh: Mesh) -> Program:
    """Returns the decode of a chunk of latents; its parts are programs of their own, see `parts.py`."""
    autoencoder, network = _checked(sections, mesh)
    option = sections.sampling_option
    shape = latent_shape(option, sections.cond_type, autoencoder, network.patch_size)
    rows = min(sections.decode_batch_size, sections.batch_size)
    place = codec.sharding(autoencoder, mesh, rows, *shape[1:])
    latent = jax.ShapeDtypeStruct((rows, *shape, autoencoder.latent_channels), jnp.float32, sharding=place)
    graph, params = abstract_weights(sections.ae, AUTOENCODERS, "config.ae", sections.dtype, mesh)
    asked = {"frames": option.num_frames} if getattr(autoencoder, "is_decoded_to_frames", False) else {}

    def run(params, latent):
        return codec.to_bytes(nnx.merge(graph, params).decode(latent, **asked))

    others = abstract_weights(sections.model, DENOISERS, "config.model", sections.dtype, mesh)[1]
    beside = {"denoiser": others, "text encoders": text_weights(sections, mesh)}
    return Program(
        "decode",
        run,
        (params, latent),
        {"parameters": params} | beside | {"batch": latent},
        0.0,
        rows,
        0,
        {},
    )


def abstract_autoencoder(section: Mapping[str, Any]) -> Any:
    """Returns the autoencoder of a section without its weights."""
    module, config = parse_model(section, AUTOENCODERS, "config.ae")
    return nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0)))


def abstract_weights(
    section: Mapping[str, Any], kinds: Any, where: str, dtype: str, mesh: Mesh
) -> tuple[nnx.GraphDef, nnx.State]:
    """Returns a network's graph and the shapes of its parameters as sampling holds them."""
    module, config = parse_model(section, kinds, where)
    wanted = parse_dtype(dtype)
    graph, shapes = nnx.split(nnx.eval_shape(lambda: module(config, dtype=wanted, rngs=nnx.Rngs(0))))
    placed = param_shardings(shapes, mesh)
    return graph, jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, wanted, sharding=s), shapes, placed)


def text_weights(sections: SampleSections, mesh: Mesh) -> list[nnx.State]:
    """Returns the shapes of the text encoders' parameters as sampling holds them."""
    found = sections.text_networks.items()
    return [
        abstract_weights({"type": kind} | fields, TEXT_ENCODERS, f"config.{kind}", sections.dtype, mesh)[1]
        for kind, fields in found
    ]


def video_tokens(latent: tuple[int, ...], network: MMDiTConfig) -> int:
    """Returns the tokens that a latent of shape B T H W C has for a denoiser."""
    _, frames, height, width, _ = latent
    return frames * height * width // network.patch_size**2


def key(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Returns the shape of a run's random key, on all devices."""
    shape = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def bytes_on_a_device(tree: Any) -> int:
    """Returns the bytes that a device holds of a tree of shapes with shardings."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _checked(sections: SampleSections, mesh: Mesh) -> tuple[Any, MMDiTConfig]:
    """Returns the autoencoder without its weights and the denoiser's shape, all checked as `sample` does."""
    check_batch_sizes(mesh, sections.batch_size, sections.decode_batch_size)
    autoencoder = sections.stage.check()
    sections.stage.check_heads(mesh)
    return autoencoder, parse_model(sections.model, DENOISERS, "config.model")[1]
