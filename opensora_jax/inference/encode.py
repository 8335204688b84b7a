"""Runs the frozen encoders over a data set once: latents and text embeddings to the cache that training reads."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import pyarrow as pa
from jax import Array
from tqdm import tqdm

from opensora_jax.config.errors import UserError
from opensora_jax.data.buckets import Bucket, Buckets
from opensora_jax.data.clips import ClipDataset, assigned_rows, read_once
from opensora_jax.data.latents import LatentCache, LatentWriter
from opensora_jax.data.loader import ClipSource
from opensora_jax.data.records import read_table
from opensora_jax.inference.prompt import TextEncoderConfig, TextEncoders
from opensora_jax.models.codec import Codec
from opensora_jax.parallel.mesh import MeshConfig, make_mesh
from opensora_jax.weights.pretrained import AUTOENCODERS, fingerprint, load, parse_dtype

TEXTS_AT_ONCE = 256


@dataclass(frozen=True)
class EncodeConfig:
    """`posterior` is the latent's mode, or a draw that depends on the seed and the row alone."""

    batch_size: int
    posterior: Literal["mode", "sample"]
    seed: int

    def keys(self, rows: Sequence[int]) -> Array | None:
        """Returns a key for each clip of a batch, which short ones fill up by starting again; None for modes."""
        if self.posterior == "mode":
            return None
        filled = np.resize(np.asarray(rows, np.uint32), self.batch_size)
        return jax.vmap(lambda row: jax.random.fold_in(jax.random.key(self.seed), row))(filled)


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
    mesh: MeshConfig


def run(job: EncodeJob) -> LatentCache:
    """Returns the cache in `job.latents`: made now, or found there with the same key.

    Raises: UserError when the folder holds the work of other encoders or of another table.
    """
    dtype, dataset, config = parse_dtype(job.dtype), job.dataset, job.encode
    mesh = make_mesh(job.mesh)
    autoencoder = load(job.ae, AUTOENCODERS, "config.ae", dtype=dtype, mesh=mesh)
    texts = TextEncoders.load(job.t5, job.clip, dtype, mesh)
    table = read_table(dataset.data_path)
    buckets = Buckets(job.bucket_config, spatial_unit=dataset.spatial_unit, fps_max=dataset.fps_max)
    rows = assigned_rows(table, buckets, config.seed)
    key = _key(autoencoder, texts, config, table, rows)
    if job.latents.exists():
        cache = LatentCache(job.latents, key)
        print(f"{job.latents} holds the {len(cache)} latents of these clips and encoders already")
        return cache
    writer = LatentWriter(job.latents, key)
    captions = table["text"].to_pylist()
    text_ids = _write_texts(writer, texts, sorted({captions[row] for _, row in rows} - {""}))
    _write_latents(
        writer,
        Codec(autoencoder, mesh),
        dataset.source(table),
        rows,
        {row: text_ids[captions[row]] for _, row in rows},
        config,
    )
    return LatentCache(writer.finish(), key)


def _key(autoencoder: Any, texts: TextEncoders, config: EncodeConfig, table: pa.Table, rows: Any) -> str:
    """Returns a hash of all that the cached values depend on: weights, configs, files, captions and buckets."""
    models = (fingerprint(autoencoder), autoencoder.config, texts.identity(), config.posterior, config.seed)
    files = table.select(["path", "text", "size_bytes", "mtime_ns"]).to_pylist()
    return hashlib.sha256(repr((models, files, rows)).encode()).hexdigest()[:16]


def _write_texts(writer: LatentWriter, texts: TextEncoders, captions: list[str]) -> dict[str, int]:
    """Returns the id of every caption, the null text among them."""
    ids: dict[str, int] = {}
    for start in tqdm(range(0, len(captions) + 1, TEXTS_AT_ONCE), desc="encode texts", unit="batch"):
        part = ["", *captions][start : start + TEXTS_AT_ONCE]
        for text, embedding, pooled in zip(part, *texts.encode(part), strict=True):
            ids[text] = writer.add_text(text, embedding, pooled)
    return ids


def _write_latents(
    writer: LatentWriter,
    codec: Codec,
    source: ClipSource,
    rows: list[tuple[Bucket, int]],
    text_ids: dict[int, int],
    config: EncodeConfig,
) -> None:
    counted = 0
    for bucket, ids, clips in read_once(source, rows, config.batch_size, "encode clips"):
        latents = codec.encode(clips, config.keys(ids))
        for row, latent in zip(ids, np.asarray(latents), strict=False):
            fps, path = source.facts["fps"][row].item(), str(source.paths[row])
            writer.add_latent(row, bucket, latent, text_ids[row], fps, path)
            counted += 1
    if not counted:
        raise UserError(f"none of the {len(rows)} clips could be encoded: see the warnings above")
