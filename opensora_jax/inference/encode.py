"""Runs the frozen encoders over a data set once: latents and text embeddings to the cache that training reads."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from flax import nnx
from tqdm import tqdm

from opensora_jax.data.cache.cache_key import Identity
from opensora_jax.data.cache.latent_writer import LatentWriter
from opensora_jax.data.cache.latents import CacheInfo, LatentCache, Origin
from opensora_jax.data.clips import ClipDataset, assigned_rows
from opensora_jax.data.plan.auto import with_ones
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
from opensora_jax.weights.pretrained import AUTOENCODERS, SOURCE_FIELDS, load, parse_dtype, parse_model
from opensora_jax.weights.stamp import file_stamps

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
    connect(job.distributed, apart=True)
    host, dataset, config = host or this_host(), job.dataset, job.encode
    origin = Origin.of(with_ones(job.bucket_config), config.seed, stamps(job))
    table = dataset.table()
    rows = assigned_rows(table, dataset.buckets(with_ones(job.bucket_config)), config.seed)
    texts = Texts.of(config.texts(table, dataset.fps_max), [row for _, row in rows])
    module, fields = parse_model(job.ae, AUTOENCODERS, "config.ae")
    check_sizes(nnx.eval_shape(lambda: module(fields, rngs=nnx.Rngs(0))), rows)
    dtype, mesh = parse_dtype(job.dtype), this_process()
    autoencoder = load(job.ae, AUTOENCODERS, "config.ae", dtype=dtype, mesh=mesh)
    identity = latents_identity(autoencoder, job.dtype, config, dataset, table, rows)
    encoders_digest = encoders_identity(job.t5, job.clip, dtype)
    digests = {"text encoders": encoders_digest, "captions": captions_digest(texts)}
    ends = {"images of condition_config": job.ends} if job.ends else {}
    identity = Identity(identity.digests | digests, identity.settings | text_settings(config) | ends)
    stored = (config.dtype or job.dtype, len(rows), config.shard_clips, len(texts.distinct), config.shard_texts)
    writer = LatentWriter(job.latents, CacheInfo("dataset encode", identity, *stored, origin=origin))
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


def captions_digest(texts: Texts) -> str:
    """Returns the part of an identity that says which texts the rows have."""
    return digest(column_digest(texts.distinct), texts.of_row[texts.of_row >= 0].astype("<i8").tobytes())


def text_settings(config: EncodeConfig) -> dict[str, Any]:
    """Returns the settings that decide what stands behind the captions."""
    return {"encode.fps_suffix": config.fps_suffix, "encode.motion_score": config.motion_score}


def stamps(job: EncodeJob) -> dict[str, str]:
    """Returns what tells cheaply whether encoders have changed: a digest by the name of each that has weights here.

    It covers names, sizes and times of files, and how they are read; a folder may be moved.
    """
    source = {name: job.ae[name] for name in SOURCE_FIELDS if name in job.ae and name != "from_pretrained"}
    lengths = [job.t5.max_length, job.clip.max_length]
    parts = {
        "autoencoder weights": ([job.ae.get("from_pretrained")], source),
        "text encoders": ([job.t5.from_pretrained, job.clip.from_pretrained], lengths),
    }
    found = {}
    for name, (paths, more) in parts.items():
        files = [file_stamps(path) if path else [] for path in paths]
        if all(files):
            found[name] = digest(json.dumps([files, more]))
    return found
