"""Trains an autoencoder on clips: `python -m opensora_jax.train_vae --config=configs/vae/train/demo.py`.

After the last step it measures the latent's mean and standard deviation (`latent.json`, which normalises the latent
for the denoiser) and reconstructs held-out clips (`validation.json`, `reconstructions/`). The same command again
continues an interrupted run, exactly.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
from absl import logging
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from opensora_jax.config.build import build
from opensora_jax.config.command import run
from opensora_jax.config.errors import UserError
from opensora_jax.config.files import write_json
from opensora_jax.config.flag import config_flag
from opensora_jax.data.clips import ClipDataset, ImageSteps, assigned_rows
from opensora_jax.data.loader import LoaderConfig, example_batches, make_loader
from opensora_jax.data.plan.buckets import Bucket, Buckets
from opensora_jax.data.plan.plan import Plan
from opensora_jax.data.table.records import read_table
from opensora_jax.inference.latents import check_sizes
from opensora_jax.models.codec import Codec
from opensora_jax.parallel.batch import abstract_batch, data_share, to_host
from opensora_jax.parallel.distributed import DistributedConfig, connect, end_at_once, from_first
from opensora_jax.parallel.mesh import MeshConfig, data_shards, make_mesh, one_device, this_process
from opensora_jax.training import reconstruction, vae
from opensora_jax.training.loop import LoopConfig, Run
from opensora_jax.training.optimizer import OptimConfig, make_optimizer
from opensora_jax.training.programs import Assembled
from opensora_jax.training.state import check_average, make_train_step, plan_state
from opensora_jax.weights.lora import frozen_parameters
from opensora_jax.weights.pretrained import (
    AUTOENCODERS,
    CRITICS,
    LATENT_FILE,
    describe,
    initial_weights,
    load,
    parse_dtype,
    parse_model,
)

CONFIG = config_flag()


@dataclass(frozen=True)
class ValidationConfig:
    """Clips to validate on: a table of its own, or up to `clips` rows held out of the training table."""

    data_path: str
    clips: int
    latent_clips: int  # clips of the training table from which the latent's statistics are measured

    def __post_init__(self):
        """Refuse what would be found out after training."""
        if self.clips < 0 or self.latent_clips < 1:
            raise ValueError(f"clips is at least 0, latent_clips at least 1: got {self.clips} and {self.latent_clips}.")


@dataclass(frozen=True)
class TrainVAEConfig:
    """A config of configs/vae/train."""

    folder: str
    workdir: Path
    seed: int
    dtype: str
    model: Any  # type and the fields of that type
    dataset: ClipDataset
    images: ImageSteps
    validation: ValidationConfig
    bucket_config: dict[str, dict[int, Any]]
    loader: LoaderConfig
    small_buckets: str  # what to do with fewer samples than a batch: error, drop or repeat
    vae_loss_config: vae.VAELossConfig
    lpips: Any  # type and where its weights are, for the perceptual loss
    optim: OptimConfig
    ema_decay: float | None
    mesh: MeshConfig
    distributed: DistributedConfig
    loop: LoopConfig

    def __post_init__(self):
        """Check what no other section knows."""
        check_average(self.ema_decay)


def main(argv: list[str]) -> Path | None:
    """Trains as the config says, then measures the result; returns the workdir."""
    config = build(TrainVAEConfig, CONFIG.value, "config")
    connect(config.distributed, saves=True)
    mesh = make_mesh(config.mesh)
    module, model_config = parse_model(config.model, AUTOENCODERS, "config.model")
    dtype, ema = parse_dtype(config.dtype), config.ema_decay is not None
    if not hasattr(model_config, "scale_factor"):
        raise UserError(f"train_vae trains hunyuan_vae and flux_ae: got config.model.type={config.model['type']!r}")

    dataset = config.dataset
    buckets = dataset.buckets(config.bucket_config)
    training, held_out = split(dataset.table(), config.validation, buckets, config.seed)
    held_out_rows = assigned_rows(held_out, buckets, config.seed)
    shards, small = data_shards(mesh), config.small_buckets
    plan = Plan(training, buckets, seed=config.seed, data_shards=shards, small_buckets=small)
    rows = assigned_rows(training, buckets, config.seed)
    check_sizes(nnx.eval_shape(lambda: module(model_config, rngs=nnx.Rngs(0))), [*rows, *held_out_rows])
    logging.info("%s", plan.describe())
    host, source = data_share(mesh), dataset.source(training)

    optimizer = make_optimizer(config.optim, config.loop.num_steps)
    graphdef, abstract, init = plan_state(
        lambda: module(model_config, dtype=dtype, rngs=nnx.Rngs(config.seed)),
        optimizer,
        mesh,
        ema=ema,
        pretrained=initial_weights(config.model, AUTOENCODERS, "config.model", mesh=mesh),
        frozen=frozen_parameters(config.model["type"], config.optim.freeze, None),
    )
    examples = config.images.examples(example_batches(plan, source, host=host))
    loss = vae.VAELoss(config.vae_loss_config, perceptual_distance(config))
    meta = describe(config.model["type"], model_config) | {"ema": ema, "plan": plan.hash}
    meta |= {"freeze": list(config.optim.freeze), "optimizer": config.optim.cls}
    state = Run(config.workdir, "train_vae", config.seed, mesh, config.loop, meta, CONFIG.value.to_dict()).fit(
        Assembled(graphdef, abstract, init, make_train_step(graphdef, loss, optimizer, ema_decay=config.ema_decay)),
        lambda start, stop: config.images.apply(
            make_loader(plan, source, start_step=start, num_steps=stop - start, host=host, config=config.loader),
            config.seed,
        ),
        {name: abstract_batch(batch, mesh) for name, batch in examples.items()},
    )
    end_at_once()
    if from_first(is_measured(config.workdir, int(state.step))):
        return config.workdir if jax.process_index() == 0 else None
    params = jax.tree.map(to_host, state.averaged_params)  # every process has a part
    if jax.process_index() == 0:
        own = this_process()
        codec = Codec(nnx.merge(graphdef, jax.device_put(params, NamedSharding(own, PartitionSpec()))), own)
        latent_rows = rows[: config.validation.latent_clips]
        latent = reconstruction.measure_latent(codec, source, latent_rows, rows[0][0].batch_size)
        write_json(config.workdir / LATENT_FILE, latent)
        measured = validate(config, codec, held_out, held_out_rows)
        write_json(config.workdir / "validation.json", {"step": int(state.step)} | measured)
        logging.info("held-out clips: %s", measured)
    from_first(None)  # the others wait: processes end together
    return config.workdir if jax.process_index() == 0 else None


def perceptual_distance(config: TrainVAEConfig) -> nnx.Module | None:
    """Returns LPIPS with its weights in this host's memory, None where the loss gives it none.

    They are constants of the compiled step, the same on all hosts.
    Raises: UserError when they are not there.
    """
    if not config.vae_loss_config.perceptual_loss_weight:
        return None
    mesh = one_device()
    kinds, dtype = {"lpips": CRITICS["lpips"]}, parse_dtype(config.dtype)
    graphdef, params = nnx.split(load(config.lpips, kinds, "config.lpips", dtype=dtype, mesh=mesh))
    return nnx.merge(graphdef, jax.device_get(params))


def split(table: pa.Table, config: ValidationConfig, buckets: Buckets, seed: int) -> tuple[pa.Table, pa.Table]:
    """Returns the tables for training and validation.

    Of the rows that have a bucket at most a tenth is held out, but one of two or more. Raises: UserError if none has.
    """
    if config.data_path:
        return table, read_table(config.data_path)
    usable = sorted(row for _, row in assigned_rows(table, buckets, seed))
    count = max(min(config.clips, len(usable) // 10), min(1, len(usable) - 1))
    held_out = np.random.default_rng(seed).permutation(usable)[:count]
    if count == 0:
        return table, table
    chosen = np.isin(np.arange(len(table)), held_out)
    return table.filter(pa.array(~chosen)), table.filter(pa.array(chosen))


def validate(config: TrainVAEConfig, codec: Codec, table: pa.Table, rows: list[tuple[Bucket, int]]) -> dict[str, Any]:
    """Writes the reconstructions of a table's clips and returns their error."""
    clips, captions = config.dataset.source(table), table["text"].to_pylist()
    folder, batch_size = config.workdir / "reconstructions", rows[0][0].batch_size
    return reconstruction.validate(codec, clips, rows, captions, batch_size, folder)


def is_measured(workdir: Path, step: int) -> bool:
    """Returns whether the autoencoder of this step has been validated already."""
    path = workdir / "validation.json"
    return path.is_file() and json.loads(path.read_text())["step"] == step


if __name__ == "__main__":
    run(main)
