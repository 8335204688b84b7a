"""Trains a denoiser: `python -m opensora_jax.train --config=configs/diffusion/train/demo.py`.

It reads the latents and embeddings that `dataset encode` cached, or, where `latents` is empty, videos and captions. The
same command again continues an interrupted run, exactly. A finished run is left as it is.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pyarrow as pa
from absl import logging
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from opensora_jax.config.build import build
from opensora_jax.config.command import run
from opensora_jax.config.errors import UserError
from opensora_jax.config.flag import config_flag
from opensora_jax.data.cache.latents import CachedBuckets, LatentCache
from opensora_jax.data.clip_source import Captions
from opensora_jax.data.clips import ClipDataset
from opensora_jax.data.loader import Batch, LatentSource, LoaderConfig, Source, example_batches, make_loader
from opensora_jax.data.plan.digests import digest
from opensora_jax.data.plan.plan import Assigner, Plan
from opensora_jax.inference.encode import EncodeConfig
from opensora_jax.inference.prompt import TextEncoderConfig, Tokenizers, load_encoder
from opensora_jax.models.codec import Codec
from opensora_jax.models.mmdit import MMDiTConfig
from opensora_jax.nn.lora import LoRAConfig
from opensora_jax.parallel.batch import abstract_batch, data_share
from opensora_jax.parallel.distributed import DistributedConfig, connect
from opensora_jax.parallel.mesh import MeshConfig, check_heads, data_shards, make_mesh
from opensora_jax.training.conditions import ConditionMix
from opensora_jax.training.diffusion import DropoutRatio, FlowConfig, NullText, Objective
from opensora_jax.training.encoders import Encoders, VideoEncoder
from opensora_jax.training.flops import training_flops
from opensora_jax.training.loop import LoopConfig, Run
from opensora_jax.training.optimizer import OptimConfig, make_optimizer
from opensora_jax.training.state import make_train_step, plan_state
from opensora_jax.training.throughput import Work
from opensora_jax.weights.adapter import write_adapter
from opensora_jax.weights.lora import base_and_lora, frozen_parameters, with_lora
from opensora_jax.weights.pretrained import (
    AUTOENCODERS,
    DENOISERS,
    describe,
    initial_weights,
    load,
    parse_dtype,
    parse_model,
)

CONFIG = config_flag()


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
    loader: LoaderConfig
    small_buckets: str  # what to do with fewer samples than a batch: error, drop or repeat
    flow: FlowConfig
    condition_config: dict[str, float]  # condition: weight
    no_i2v_ref_loss: bool  # given images do not count in the loss
    guidance: float | None  # what models with guidance_embed are told
    dropout_ratio: DropoutRatio
    lora: LoRAConfig | None  # train only thin matrices beside the layers it names
    optim: OptimConfig
    accumulation_steps: int  # parts that a step takes a batch in, one after the other
    ema_decay: float | None
    mesh: MeshConfig
    distributed: DistributedConfig
    loop: LoopConfig


def main(argv: list[str]) -> Path | None:
    """Trains as the config says; returns the workdir."""
    config = build(TrainConfig, CONFIG.value, "config")
    connect(config.distributed)
    mesh = make_mesh(config.mesh)
    model_config = parse_model(config.model, DENOISERS, "config.model")[1]
    check_heads(model_config.num_heads, mesh)
    autoencoder: Any = parse_model(config.ae, AUTOENCODERS, "config.ae")[0]
    mix = ConditionMix.parse(config.condition_config, autoencoder.is_causal)
    feed = cached(config) if config.latents else encoded(config, mesh, mix)
    batches = Batches(feed, plan_of(config, feed, mesh), mix, mesh, config)
    logging.info("%s", batches.plan.describe())
    examples = batches.examples()
    check_fits(model_config, next(iter(examples.values())))
    objective = Objective(config.flow, config.dropout_ratio, feed.null, mix, config.guidance, config.no_i2v_ref_loss)
    objective.check(examples, cond_embed=model_config.cond_embed, guidance_embed=model_config.guidance_embed)

    optimizer = make_optimizer(config.optim, config.loop.num_steps)
    make, start = denoiser(config, mesh)
    graphdef, abstract, init = plan_state(
        make,
        optimizer,
        mesh,
        ema=config.ema_decay is not None,
        pretrained=start,
        frozen=frozen_parameters(config.model["type"], config.optim.freeze, config.lora),
        frozen_dtype=held_dtype(config),
    )
    step = make_train_step(
        graphdef, objective, optimizer, ema_decay=config.ema_decay, accumulation_steps=config.accumulation_steps
    )
    meta = describe(config.model["type"], model_config)
    meta |= {"ema": config.ema_decay is not None, "latents": feed.key, "plan": batches.plan.hash}
    meta |= {"freeze": list(config.optim.freeze), "lora": config.lora and asdict(config.lora)}
    settings, full = CONFIG.value.to_dict(), config.lora is None
    run = Run(config.workdir, "train", config.seed, mesh, config.loop, meta, settings, save_frozen=full)
    state = run.fit(
        step, init, abstract, batches, examples, encode=feed.encode, work=lambda batch: work_of(model_config, batch)
    )
    if config.lora is not None:
        base = config.model["from_pretrained"]
        write_adapter(config.workdir / "lora", config.model["type"], state.averaged_params, config.lora, base)
    return config.workdir


def denoiser(config: TrainConfig, mesh: Mesh) -> tuple[Callable[[], nnx.Module], Callable[[], nnx.State] | None]:
    """Returns what makes the model, with its LoRA where there is one, and what reads the weights it starts from."""
    module, fields = parse_model(config.model, DENOISERS, "config.model")
    kind = config.model["type"]
    start = initial_weights(config.model, DENOISERS, "config.model", mesh=mesh, param_dtype=held_dtype(config))

    def make() -> nnx.Module:
        return module(fields, dtype=parse_dtype(config.dtype), rngs=nnx.Rngs(config.seed))

    if config.lora is None:
        return make, start
    return with_lora(make, kind, config.lora, config.seed), base_and_lora(start, kind, config.lora, mesh)


def held_dtype(config: TrainConfig) -> DTypeLike:
    """Returns the dtype of parameters that do not learn: beside a LoRA nothing is ever added to them."""
    return jnp.float32 if config.lora is None else parse_dtype(config.dtype)


class Feed(NamedTuple):
    """What training reads: a plan's table and buckets, samples, and how a batch on the devices is encoded."""

    table: pa.Table
    buckets: Assigner
    source: Source
    null: NullText
    key: str  # of what latents and texts are made of
    latent_frames: Callable[[dict[str, Any]], int]
    encode: Callable[[dict[str, Any]], dict[str, Any]] = lambda batch: batch
    abstract: Callable[[dict[str, Any]], dict[str, Any]] = lambda batch: batch


@dataclass(frozen=True)
class Batches:
    """This host's batches of a plan, with the condition of each sample; called with the first step and the last."""

    feed: Feed
    plan: Plan
    mix: ConditionMix
    mesh: Mesh
    config: TrainConfig

    def __call__(self, start: int, stop: int) -> Iterator[Batch]:
        """Returns the batches of steps start .. stop - 1."""
        host, source, config = data_share(self.mesh), self.feed.source, self.config.loader
        loader = make_loader(self.plan, source, start_step=start, num_steps=stop - start, host=host, config=config)
        return map(self._conditioned, loader)

    def examples(self) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """Returns bucket -> shapes of what a step reads."""
        found = example_batches(self.plan, self.feed.source, host=data_share(self.mesh))
        placed = {name: abstract_batch(self._conditioned(batch), self.mesh) for name, batch in found.items()}
        return {name: self.feed.abstract(batch) for name, batch in placed.items()}

    def _conditioned(self, batch: Batch) -> Batch:
        return self.mix.add(batch, self.config.seed, self.feed.latent_frames(batch))


def plan_of(config: TrainConfig, feed: Feed, mesh: Mesh) -> Plan:
    """Returns the plan of all batches; a step's batch is as much larger as it has parts."""
    shards = data_shards(mesh) * config.accumulation_steps
    return Plan(feed.table, feed.buckets, seed=config.seed, data_shards=shards, small_buckets=config.small_buckets)


def cached(config: TrainConfig) -> Feed:
    """Returns the latents and texts of a cache."""
    cache = LatentCache(config.latents)
    null = NullText(**jax.device_put(cache.null_text))
    source, buckets = LatentSource(cache), CachedBuckets(config.bucket_config)
    return Feed(cache.index, buckets, source, null, cache.key, lambda batch: batch["latent"].shape[1])


def encoded(config: TrainConfig, mesh: Mesh, mix: ConditionMix) -> Feed:
    """Returns clips and captions, which frozen encoders turn into latents and embeddings before each step."""
    dataset, encode, dtype = config.dataset, config.encode, parse_dtype(config.dtype)
    t5, clip = (load_encoder(kind, getattr(config, kind), dtype, mesh) for kind in ("t5", "clip"))
    codec = Codec(load(config.ae, AUTOENCODERS, "config.ae", dtype=dtype, mesh=mesh), mesh)
    video = VideoEncoder(codec, mix, encode.posterior, encode.seed, encode.batch_size)
    encoders = Encoders(video, t5, clip)
    table = dataset.table()
    captions = Captions(encode.texts(table, dataset.fps_max), Tokenizers(t5.tokenizer, clip.tokenizer))
    null = NullText(*(jnp.asarray(encoder.encode([""], 1)[0]) for encoder in (t5, clip)))
    key = digest(json.dumps([config.ae, asdict(config.t5), asdict(config.clip), asdict(encode)], default=str))
    return Feed(
        table,
        dataset.buckets(config.bucket_config),
        dataset.source(table, captions),
        null,
        f"encoded while training, {key}",
        lambda batch: video.latent_frames(batch["video"]),
        encoders,
        encoders.abstract,
    )


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
