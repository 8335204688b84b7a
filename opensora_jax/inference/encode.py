"""Runs the frozen encoders over a data set once: latents and text embeddings to the cache that training reads."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from flax import nnx
from tqdm import tqdm

from opensora_jax.data.cache.cache_key import Identity
from opensora_jax.data.cache.latent_writer import LatentWriter
from opensora_jax.data.cache.latents import CacheInfo, LatentCache
from opensora_jax.data.clips import ClipDataset, assigned_rows
from opensora_jax.data.plan.digests import column_digest, digest
from opensora_jax.data.text import Texts, training_texts
from opensora_jax.diffusion.conditions import visible_frames
from opensora_jax.inference.latents import (
    ClipWork,
    Host,
    LatentConfig,
    check_sizes,
    finish,
    latents_identity,
    missing,
    this_host,
    write_latents,
)
from opensora_jax.inference.prompt import TextEncoderConfig, TextEncoders, encoders_identity
from opensora_jax.models.codec import Codec
from opensora_jax.parallel.distributed import DistributedConfig, connect
from opensora_jax.parallel.mesh import this_process
from opensora_jax.weights.pretrained import AUTOENCODERS, load, parse_dtype, parse_model

TEXTS_AT_ONCE = 32  # 256 MB of T5-XXL's embeddings in float32


@dataclass(frozen=True)
class EncodeConfig(LatentConfig):
    """A config's `encode` section: latents and texts, `shard_texts` of them in a file.

    `fps_suffix` writes the frame rate behind each caption, `motion_score` the score of that column ("": none).
    """

    shard_texts: int
    fps_suffix: bool
    motion_score: str

    def __post_init__(self):
        """Refuse what makes no shard."""
        super().__post_init__()
        if self.shard_texts < 1:
            raise ValueError(f"shard_texts is at least 1: got {self.shard_texts}")

    def texts(self, table: pa.Table, fps_max: float) -> pa.ChunkedArray:
        """Returns what the encoders read for every row. Raises: UserError, see `training_texts`."""
        return training_texts(table, fps_max=fps_max, fps_suffix=self.fps_suffix, motion_score=self.motion_score)


@dataclass(frozen=True)
class EncodeJob:
    """The sections of a training config that decide what is cached, and where."""

    dtype: str
    ae: Any  # type, from_pretrained and the fields of that type
    t5: TextEncoderConfig
    clip: TextEncoderConfig
    dataset: ClipDataset
    latents: Path
    encode: EncodeConfig
    bucket_config: dict[str, dict[int, Any]]
    condition_config: dict[str, float]  # its images are encoded alone as well
    distributed: DistributedConfig

    def __post_init__(self):
        """Refuse conditions that there are not, and a cache without a folder."""
        if self.latents == Path():
            raise ValueError("latents is empty, which is for training without a cache: name a folder to encode into.")
        _ = self.ends

    @property
    def ends(self) -> tuple[str, ...]:
        """The ends of clips that its conditions show as images: "head", "tail"."""
        sizes = [visible_frames(name, causal=True) for name, weight in self.condition_config.items() if weight]
        return tuple(end for i, end in enumerate(("head", "tail")) if any(size[i] == 1 for size in sizes))


def run(job: EncodeJob, host: Host | None = None) -> LatentCache | None:
    """Makes what the cache in `job.latents` lacks; returns it, or None while other processes are at work.

    Raises: UserError when the folder holds the cache of other encoders, settings or clips.
    """
    connect(job.distributed)
    host, dataset, config = host or this_host(), job.dataset, job.encode
    table = dataset.table()
    rows = assigned_rows(table, dataset.buckets(job.bucket_config), config.seed)
    texts = Texts.of(config.texts(table, dataset.fps_max), [row for _, row in rows])
    module, fields = parse_model(job.ae, AUTOENCODERS, "config.ae")
    check_sizes(nnx.eval_shape(lambda: module(fields, rngs=nnx.Rngs(0))), rows)
    dtype, mesh = parse_dtype(job.dtype), this_process()
    autoencoder = load(job.ae, AUTOENCODERS, "config.ae", dtype=dtype, mesh=mesh)
    identity = latents_identity(autoencoder, job.dtype, config, dataset, table, rows)
    identity = _with_texts(identity, encoders_identity(job.t5, job.clip, dtype), texts, config)
    if job.ends:
        identity = Identity(identity.digests, identity.settings | {"images of condition_config": job.ends})
    stored = (config.dtype or job.dtype, len(rows), config.shard_clips, len(texts.distinct), config.shard_texts)
    writer = LatentWriter(job.latents, CacheInfo("dataset encode", identity, *stored))
    new = 0
    if missing(writer.texts, host)[0]:
        encoders = TextEncoders.load(job.t5, job.clip, dtype, mesh)
        writer.start()
        new = write_texts(writer, texts, encoders, host)
        del encoders  # T5-XXL is far larger than what follows
    writer.start()
    work = ClipWork(Codec(autoencoder, mesh), dataset.source(table), rows, config, texts.of_row, job.ends)
    return finish(writer, new + write_latents(writer, work, host))


def write_texts(writer: LatentWriter, texts: Texts, encoders: TextEncoders, host: Host) -> int:
    """Writes the embeddings of the shards that are left for this host; returns the number of shards."""
    todo, done = missing(writer.texts, host)
    parts = [texts.distinct[writer.texts.part(shard)] for shard in todo]
    with tqdm(total=done + sum(map(len, parts)), initial=done, desc="encode texts", unit="text") as bar:
        for shard, part in zip(todo, parts, strict=True):
            with writer.writing_texts(shard) as file:
                for start in range(0, len(part), TEXTS_AT_ONCE):
                    batch = part[start : start + TEXTS_AT_ONCE].to_pylist()
                    for text, *embeddings in zip(batch, *map(np.asarray, encoders.encode(batch)), strict=True):
                        file.add(text, *embeddings)
                    bar.update(len(batch))
    return len(todo)


def _with_texts(identity: Identity, encoders: str, texts: Texts, config: EncodeConfig) -> Identity:
    captions = digest(column_digest(texts.distinct), texts.of_row[texts.of_row >= 0].astype("<i8").tobytes())
    return Identity(
        identity.digests | {"text encoders": encoders, "captions": captions},
        identity.settings | {"encode.fps_suffix": config.fps_suffix, "encode.motion_score": config.motion_score},
    )
