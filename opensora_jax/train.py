"""Trains a denoiser on cached latents: `python -m opensora_jax.train --config=configs/diffusion/train/demo.py`.

The same command again continues an interrupted run, exactly. A finished run is left as it is.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from absl import logging
from flax import nnx

from opensora_jax.config.build import build
from opensora_jax.config.command import run
from opensora_jax.config.errors import UserError
from opensora_jax.config.flag import config_flag
from opensora_jax.data.clips import ClipDataset
from opensora_jax.data.latents import CachedBuckets, LatentCache
from opensora_jax.data.loader import LatentSource, make_loader
from opensora_jax.data.plan import Plan
from opensora_jax.inference.encode import EncodeConfig
from opensora_jax.inference.prompt import TextEncoderConfig
from opensora_jax.models.mmdit import MMDiTConfig
from opensora_jax.parallel.mesh import MeshConfig, data_shards, make_mesh
from opensora_jax.training.diffusion import DropoutRatio, FlowConfig, NullText, make_loss
from opensora_jax.training.loop import LoopConfig, Run
from opensora_jax.training.optimizer import OptimConfig, make_optimizer
from opensora_jax.training.state import make_train_step, plan_state
from opensora_jax.weights.pretrained import DENOISERS, describe, initial_weights, parse_dtype, parse_model

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
    latents: Path
    encode: EncodeConfig
    bucket_config: dict[str, dict[int, Any]]
    small_buckets: str  # what to do with fewer samples than a batch: error, drop or repeat
    flow: FlowConfig
    dropout_ratio: DropoutRatio
    optim: OptimConfig
    ema_decay: float | None
    mesh: MeshConfig
    loop: LoopConfig


def main(argv: list[str]) -> Path | None:
    """Trains as the config says; returns the workdir."""
    config = build(TrainConfig, CONFIG.value, "config")
    mesh = make_mesh(config.mesh)
    module, model_config = parse_model(config.model, DENOISERS, "config.model")
    dtype, ema = parse_dtype(config.dtype), config.ema_decay is not None

    cache = LatentCache(config.latents, key=None)
    check_fits(model_config, cache)
    buckets = CachedBuckets(config.bucket_config)
    shards, small = data_shards(mesh), config.small_buckets
    plan = Plan(cache.index, buckets, seed=config.seed, data_shards=shards, small_buckets=small)
    logging.info("%s", plan.describe())
    host, source = (jax.process_index(), jax.process_count()), LatentSource(cache)

    tx = make_optimizer(config.optim, config.loop.num_steps)
    graphdef, abstract, init = plan_state(
        lambda: module(model_config, dtype=dtype, rngs=nnx.Rngs(config.seed)),
        tx,
        mesh,
        ema=ema,
        pretrained=initial_weights(config.model, DENOISERS, "config.model", mesh=mesh),
    )
    loss = make_loss(config.flow, config.dropout_ratio, NullText(**jax.device_put(cache.null_text)))
    meta = describe(config.model["type"], model_config) | {"ema": ema, "latents": cache.key, "plan": plan.hash}
    Run(config.workdir, "train", config.seed, mesh, config.loop, meta, CONFIG.value.to_dict()).fit(
        make_train_step(graphdef, loss, tx, ema_decay=config.ema_decay),
        init,
        abstract,
        lambda start, stop: make_loader(plan, source, start_step=start, num_steps=stop - start, host=host),
    )
    return config.workdir


def check_fits(model: MMDiTConfig, cache: LatentCache) -> None:
    """Raises: UserError when the cached latents or texts have other sizes than the model takes."""
    sample = cache.read(0)
    for field, wanted, found in (
        ("in_channels", model.in_channels, sample["latent"].shape[-1] * model.patch_size**2),
        ("context_in_dim", model.context_in_dim, sample["text"].shape[-1]),
        ("vec_in_dim", model.vec_in_dim, sample["pooled"].shape[-1]),
    ):
        if wanted != found:
            raise UserError(
                f"config.model.{field} is {wanted}, but {cache.folder} needs {found}: "
                f"set --config.model.{field}={found}, or encode with other models"
            )


if __name__ == "__main__":
    run(main)
