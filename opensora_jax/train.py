"""Trains a denoiser: `python -m opensora_jax.train --config=configs/diffusion/train/demo.py`.

It reads the latents and embeddings that `dataset encode` cached, or, where `latents` is empty, videos and captions. The
same command again continues an interrupted run, exactly. A finished run is left as it is. A config with `stages` trains
one after the other, each from the weights of the one before.
"""

import gc
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from absl import logging
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from opensora_jax.config.build import build
from opensora_jax.config.command import run
from opensora_jax.config.errors import UserError
from opensora_jax.config.flag import config_flag
from opensora_jax.config.stages import stage_names
from opensora_jax.data.cache.latents import CachedBuckets, LatentCache
from opensora_jax.data.clip_source import Captions
from opensora_jax.data.clips import ClipDataset
from opensora_jax.data.loader import LatentSource, LoaderConfig
from opensora_jax.data.plan.auto import BucketConfig, auto_lines, filled, with_ones
from opensora_jax.data.plan.digests import digest
from opensora_jax.data.plan.plan import Plan, Rounds
from opensora_jax.inference import stage as sampling
from opensora_jax.inference.encode import EncodeConfig, EncodeJob, text_settings
from opensora_jax.inference.latents import latent_settings
from opensora_jax.inference.preview import Preview, PreviewConfig
from opensora_jax.inference.prompt import TextEncoder, TextEncoderConfig, TextEncoders, Tokenizers, load_encoder
from opensora_jax.inference.stale import refuse_stale
from opensora_jax.models.codec import Codec
from opensora_jax.models.mmdit import MMDiTConfig
from opensora_jax.models.sizes import check_least
from opensora_jax.nn.lora import LoRAConfig
from opensora_jax.parallel.distributed import DistributedConfig, connect
from opensora_jax.parallel.mesh import MeshConfig, check_heads, data_shards, make_mesh
from opensora_jax.training.batch_sizes import AutoBatchConfig, BatchSizes
from opensora_jax.training.conditions import ConditionMix
from opensora_jax.training.diffusion import DropoutRatio, FlowConfig, NullText, Objective
from opensora_jax.training.encoders import Encoders, VideoEncoder
from opensora_jax.training.feed import Batches, Feed
from opensora_jax.training.flops import training_flops
from opensora_jax.training.loop import LoopConfig, Run, counting
from opensora_jax.training.optimizer import OptimConfig
from opensora_jax.training.periodic import Periodic, Seen
from opensora_jax.training.programs import AbstractBatch, Programs
from opensora_jax.training.recipe import Recipe
from opensora_jax.training.state import check_average
from opensora_jax.training.throughput import Work
from opensora_jax.training.validation import Validation, ValidationConfig
from opensora_jax.weights.adapter import is_adapter, write_adapter
from opensora_jax.weights.pretrained import (
    AUTOENCODERS,
    SOURCE_FIELDS,
    load,
    parse_dtype,
    parse_measured,
    parse_model,
)
from opensora_jax.weights.workdir import Stored, check_same, is_workdir

CONFIG = config_flag()
LORA = "lora"  # folder of a workdir


@dataclass(frozen=True)
class TrainConfig:
    """A config of configs/diffusion/train; `dataset encode` reads the encoders' sections, training the others."""

    folder: str
    workdir: Path
    seed: int
    dtype: str
    model: Any  # type and the fields of that type
    ae: Any
    t5: TextEncoderConfig
    clip: TextEncoderConfig
    dataset: ClipDataset
    latents: str  # folder of the cache; "": encode while training
    encode: EncodeConfig
    bucket_config: dict[str, dict[int, Any]]
    auto_batch: AutoBatchConfig  # for its lines that leave the batch size to the memory of the devices
    loader: LoaderConfig
    small_buckets: str  # what to do with fewer samples than a batch: error, drop or repeat
    flow: FlowConfig
    condition_config: dict[str, float]  # condition: weight
    no_i2v_ref_loss: bool  # given images do not count in the loss
    guidance: float | None  # what models with guidance_embed are told
    validation: ValidationConfig
    preview: PreviewConfig
    dropout_ratio: DropoutRatio
    lora: LoRAConfig | None  # train only thin matrices beside the layers it names
    optim: OptimConfig
    accumulation_steps: int  # parts that a step takes a batch in, one after the other
    compiler_options: dict[str, dict[str, Any]]  # platform: option: value
    ema_decay: float | None
    mesh: MeshConfig
    distributed: DistributedConfig
    loop: LoopConfig

    def __post_init__(self):
        """Check what no other section knows."""
        check_average(self.ema_decay)
        check_least(self, 1, "accumulation_steps")

    @property
    def recipe(self) -> Recipe:
        """The part that decides the compiled step."""
        parts = self.model, self.lora, self.optim, self.accumulation_steps, self.compiler_options, self.ema_decay
        return Recipe(self.seed, self.dtype, *parts, self.loop.num_steps)


def main(argv: list[str]) -> Path | None:
    """Trains as the config says, all of its stages if it has some; returns the last workdir."""
    stages = parse_stages(CONFIG.value)
    connect(stages[0].config.distributed, saves=True)
    for number, stage in enumerate(stages):
        if len(stages) > 1 and stage.is_finished():
            logging.info("%s is finished: on to the next stage", stage.config.workdir)
            continue
        told_to_stop = train(stage.after(stages[number - 1]) if number else stage)
        jax.clear_caches()  # the programs of a finished stage; and its arrays
        gc.collect()
        if told_to_stop and stage is not stages[-1]:
            logging.warning("%s is finished; the same command continues with the next stage", stage.config.workdir)
            raise SystemExit(0)
    return stages[-1].config.workdir if jax.process_index() == 0 else None


class Stage(NamedTuple):
    """A run of training: its config as it was given, and parsed."""

    settings: dict[str, Any]
    config: TrainConfig

    def after(self, before: "Stage") -> "Stage":
        """Returns this stage, starting from the weights of another."""
        start = {"from_pretrained": str(before.config.workdir)}
        settings = self.settings | {"model": self.settings["model"] | start}
        return Stage(settings, replace(self.config, model=self.config.model | start))

    def is_finished(self) -> bool:
        """Returns whether the workdir holds the last step already. Raises: UserError for the step of another model."""
        workdir = self.config.workdir
        if not is_workdir(workdir) or Stored(workdir).latest_step != self.config.loop.num_steps:
            return False
        check_same(self.config.recipe.description, Stored(workdir).meta, str(workdir))
        return self.config.lora is None or is_adapter(workdir / LORA)


def parse_stages(config: ConfigDict) -> list[Stage]:
    """Returns the stages of a config, which `stages` names and which are sections of it; else the config is the one.

    Raises: UserError for a name without a section, and for what is wrong in any of the stages.
    """
    if "stages" not in config:
        return [Stage(config.to_dict(), build(TrainConfig, config, "config"))]
    parts = {name: config[name] for name in stage_names(config)}
    return [Stage(part.to_dict(), build(TrainConfig, part, f"config.{name}")) for name, part in parts.items()]


def train(stage: Stage) -> bool:
    """Trains one stage to its end; returns whether the process was asked to stop during its last step."""
    config = stage.config
    config.validation.check(bool(config.latents))
    mesh = make_mesh(config.mesh)
    model_config = config.recipe.network
    check_heads(model_config.num_heads, mesh)
    autoencoder: Any = parse_model(config.ae, AUTOENCODERS, "config.ae")[0]
    mix = ConditionMix.parse(config.condition_config, autoencoder.is_causal)
    feed = cached(config, config.latents) if config.latents else encoded(config, mesh, mix)
    objective = Objective(config.flow, config.dropout_ratio, feed.null, mix, config.guidance, config.no_i2v_ref_loss)
    assembled = config.recipe.assemble(objective, mesh)
    periodic = looks(config, assembled.graphdef, objective, feed, mix, mesh)

    def prepare(bucket_config: BucketConfig, small_buckets: str) -> tuple[Batches, dict[str, AbstractBatch]]:
        shards = data_shards(mesh) * config.accumulation_steps  # a batch is as much larger as it has parts
        assigner = feed.buckets(bucket_config)
        plan = Plan(feed.table, assigner, seed=config.seed, data_shards=shards, small_buckets=small_buckets)
        batches = Batches(feed, plan, mix, mesh, config.loader)
        examples = batches.examples()
        check_fits(model_config, next(iter(examples.values())))
        objective.check(examples, cond_embed=model_config.cond_embed, guidance_embed=model_config.guidance_embed)
        return batches, examples

    bucket_config = config.bucket_config
    if auto_lines(bucket_config):
        small = "drop" if config.small_buckets == "drop" else "repeat"
        provisional, examples = prepare(with_ones(bucket_config), small)
        programs = Programs(counting(assembled), mesh)
        depends = config.recipe.memory | {"encoders": None if config.latents else feed.key}
        sizes = BatchSizes(config.workdir, config.auto_batch, mesh, programs.measure, depends)
        bucket_config = filled(bucket_config, sizes.choose(bucket_config, provisional.plan.buckets, examples))
    batches, examples = prepare(bucket_config, config.small_buckets)
    logging.info("%s", batches.plan.describe())
    meta = config.recipe.description | {"latents": feed.key, "plan": batches.plan.hash}
    settings, learnt = stage.settings, config.lora is None
    run = Run(config.workdir, "train", config.seed, mesh, config.loop, meta, settings, save_frozen=learnt)
    state = run.fit(
        assembled,
        batches,
        examples,
        encode=feed.encode,
        work=lambda batch: work_of(model_config, batch),
        periodic=periodic,
    )
    if config.lora is not None:
        base = config.model["from_pretrained"]
        write_adapter(config.workdir / LORA, config.model["type"], state.averaged_params, config.lora, base)
    return run.preemption.told


def looks(
    config: TrainConfig, graphdef: nnx.GraphDef, objective: Objective, feed: Feed, mix: ConditionMix, mesh: Mesh
) -> list[Periodic]:
    """Returns what looks at the state now and then: the loss on other clips, and videos of some prompts."""
    found = []
    if config.validation.every:
        other = validation_feed(config, feed)
        shards = data_shards(mesh)
        assigner = other.buckets(with_ones(config.bucket_config))
        plan = Rounds(other.table, assigner, seed=0, data_shards=shards, small_buckets="repeat", allow_empty=True)
        batches = Batches(other, plan, mix, mesh, config.loader)
        network = config.recipe.network
        objective.check(batches.examples(), cond_embed=network.cond_embed, guidance_embed=network.guidance_embed)
        found.append(Periodic(config.validation.every, Validation(graphdef, objective, batches, config.validation)))
    if config.preview.every:
        preview = make_preview(config, feed, mesh)
        found.append(
            Periodic(
                config.preview.every,
                lambda state: Seen({}, preview(nnx.merge(graphdef, state.averaged_params))),
            )
        )
    return found


def validation_feed(config: TrainConfig, feed: Feed) -> Feed:
    """Returns the clips to validate on, through the encoders of the clips that are trained on."""
    if not isinstance(feed.encode, Encoders):
        return cached(config, config.validation.latents)
    return videos(config, feed.encode, feed.null, replace(config.dataset, data_path=config.validation.data_path))


def make_preview(config: TrainConfig, feed: Feed, mesh: Mesh) -> Preview:
    """Returns what samples the prompts; of its networks only the autoencoder stays in memory.

    Raises: UserError for sizes and frame counts that the networks cannot take.
    """
    networks = sampling.Network("model", config.model), sampling.Network("ae", config.ae)
    sampling.Stage(*networks, config.preview.sampling_option, "t2v").check()
    dtype = parse_dtype(config.dtype)
    if isinstance(feed.encode, Encoders):
        autoencoder, encoders = feed.encode.video.codec.autoencoder, text_encoders(feed.encode)
    else:
        autoencoder = load(config.ae, AUTOENCODERS, "config.ae", dtype=dtype, mesh=mesh)
        encoders = TextEncoders.load(config.t5, config.clip, dtype, mesh)
    return Preview(config.preview, autoencoder, encoders.encode, mesh)


def cached(config: TrainConfig, folder: str) -> Feed:
    """Returns the latents and texts of a cache. Raises: UserError when it is not what the config would make now."""
    cache = LatentCache(folder)
    null = NullText(**jax.device_put(cache.null_text))
    sections = {field.name: getattr(config, field.name) for field in fields(EncodeJob)}
    refuse_stale(cache, EncodeJob(**sections | {"latents": Path(folder)}), clips=folder == config.latents)
    return Feed(
        cache.index, CachedBuckets, LatentSource(cache), null, cache.key, lambda batch: batch["latent"].shape[1]
    )


def encoded(config: TrainConfig, mesh: Mesh, mix: ConditionMix) -> Feed:
    """Returns clips and captions, which frozen encoders turn into latents and embeddings before each step."""
    encode, dtype = config.encode, parse_dtype(config.dtype)
    t5, clip = (load_encoder(kind, getattr(config, kind), dtype, mesh) for kind in ("t5", "clip"))
    codec = Codec(load(config.ae, AUTOENCODERS, "config.ae", dtype=dtype, mesh=mesh), mesh)
    video = VideoEncoder(codec, mix, encode.posterior, encode.seed, encode.batch_size)
    null = NullText(*(jnp.asarray(encoder.encode([""], 1)[0]) for encoder in (t5, clip)))
    return videos(config, Encoders(video, t5, clip), null, config.dataset)


def videos(config: TrainConfig, encoders: Encoders, null: NullText, dataset: ClipDataset) -> Feed:
    """Returns the clips and captions of a table."""
    table, encode = dataset.table(), config.encode
    texts = text_encoders(encoders)
    tokenizers = Tokenizers(texts.t5.tokenizer, texts.clip.tokenizer)
    captions = Captions(encode.texts(table, dataset.fps_max), tokenizers)
    return Feed(
        table,
        dataset.buckets,
        dataset.source(table, captions),
        null,
        f"encoded while training, {encoding_key(config)}",
        lambda batch: encoders.video.latent_frames(batch["video"]),
        encoders,
        encoders.abstract,
    )


def encoding_key(config: TrainConfig) -> str:
    """Returns what tells the latents and texts of one config from another's; encoders go by the places they are in."""
    encoders = [{name: config.ae[name] for name in SOURCE_FIELDS if name in config.ae}, config.t5, config.clip]
    module, fields = parse_measured(config.ae, AUTOENCODERS, "config.ae")
    settings = latent_settings(module, fields, config.dtype, config.encode, config.dataset)
    return digest(json.dumps([encoders, settings | text_settings(config.encode)], default=str, sort_keys=True))


def text_encoders(encoders: Encoders) -> TextEncoders:
    """Returns the text encoders among the frozen networks."""
    return TextEncoders(cast(TextEncoder, encoders.t5), cast(TextEncoder, encoders.clip))


def work_of(model: MMDiTConfig, batch: Mapping[str, Any]) -> Work:
    """Returns the work of a step on a batch of latents and texts."""
    samples, frames, height, width, _ = batch["latent"].shape
    video, text = frames * height * width // model.patch_size**2, batch["text"].shape[1]
    return Work(samples, samples * (video + text), float(samples * training_flops(model, video, text)))


def check_fits(model: MMDiTConfig, example: Mapping[str, Any]) -> None:
    """Raises: UserError when latents or texts have other sizes than the model takes."""
    for field, wanted, found in (
        ("in_channels", model.in_channels, example["latent"].shape[-1] * model.patch_size**2),
        ("context_in_dim", model.context_in_dim, example["text"].shape[-1]),
        ("vec_in_dim", model.vec_in_dim, example["pooled"].shape[-1]),
    ):
        if wanted != found:
            raise UserError(
                f"config.model.{field} is {wanted}, but the latents and texts need {found}: "
                f"set --config.model.{field}={found}, or encode with other models"
            )


if __name__ == "__main__":
    run(main)
