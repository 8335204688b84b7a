"""Clips to the latents of a cache (data/cache/latents.py): the loop behind `dataset encode` and `vae encode`.

Each process takes every count-th shard and tells the others nothing; who finds all shards there says that the cache is
complete. A killed run is continued at the shard it was at, and shards that lack clips which can be read now are made
again.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain, pairwise
from typing import Any, Literal

import jax
import numpy as np
import pyarrow as pa
from jax import Array
from jaxtyping import Int
from tqdm import tqdm

from opensora_jax.config.errors import UserError
from opensora_jax.data.cache.array_shards import ArrayShards, ShardInfo
from opensora_jax.data.cache.cache_key import Identity, buckets_digest, clips_digest
from opensora_jax.data.cache.latent_writer import LatentWriter
from opensora_jax.data.cache.latents import NO_TEXT, LatentCache
from opensora_jax.data.clip_source import ClipSource
from opensora_jax.data.clips import READ_THREADS, ClipDataset, read_batches
from opensora_jax.data.media.video import VideoError
from opensora_jax.data.plan.buckets import Bucket
from opensora_jax.models.codec import Codec
from opensora_jax.models.sizes import check_gives_back
from opensora_jax.weights.pretrained import fingerprint

Rows = Sequence[tuple[Bucket, int]]
Host = tuple[int, int]  # index and count of the processes that share the work

WITHOUT_EFFECT = ("data_path", "spatial_unit", "cache_bytes", "max_bad_rate")  # fields of ClipDataset: not on a clip
NOT_FINITE = "its latent is NaN or infinite"  # so it will be again
REASONS_SHOWN, PATHS_SHOWN = 5, 3


@dataclass(frozen=True)
class LatentConfig:
    """A config's `encode` section where only latents are made.

    `posterior` is the latent's mode, or a draw that depends on the seed and the row alone. `dtype` is that of the
    stored values; None stands for the one that the models compute in. `shard_clips` clips make a file.
    """

    batch_size: int
    posterior: Literal["mode", "sample"]
    seed: int
    dtype: Literal["float32", "bfloat16"] | None
    shard_clips: int

    def __post_init__(self):
        """Refuse what makes no batch and no shard."""
        if min(self.batch_size, self.shard_clips) < 1:
            raise ValueError(f"batch_size and shard_clips are at least 1: got {self.batch_size} and {self.shard_clips}")

    def keys(self, rows: Sequence[int]) -> Array | None:
        """Returns a key for each clip of a batch, which short ones fill up by starting again; None for modes."""
        if self.posterior == "mode":
            return None
        filled = np.resize(np.asarray(rows, np.uint32), self.batch_size)
        return jax.vmap(lambda row: jax.random.fold_in(jax.random.key(self.seed), row))(filled)


@dataclass(frozen=True)
class ClipWork:
    """Clips and what encodes them; `text_of_row` has the id of the text of every row of the table.

    `ends` are those of "head" and "tail" that are encoded alone as well, as images that a condition shows.
    """

    codec: Codec
    source: ClipSource
    rows: Rows
    config: LatentConfig
    text_of_row: Int[np.ndarray, " N"] | None = None
    ends: tuple[str, ...] = ()


def latents_identity(
    autoencoder: Any, dtype: str, config: LatentConfig, dataset: ClipDataset, table: pa.Table, rows: Rows
) -> Identity:
    """Returns what the latents of these rows depend on."""
    digests = {"autoencoder weights": fingerprint(autoencoder)} | clip_digests(table, rows)
    return Identity(digests, latent_settings(type(autoencoder), autoencoder.config, dtype, config, dataset))


def clip_digests(table: pa.Table, rows: Rows) -> dict[str, str]:
    """Returns the part of an identity that says which clips are brought to which shapes."""
    return {"clips": clips_digest(table, [row for _, row in rows]), "buckets": buckets_digest(rows)}


def latent_settings(
    autoencoder: type, fields: Any, dtype: str, config: LatentConfig, dataset: ClipDataset
) -> dict[str, Any]:
    """Returns the settings that latents depend on, by their places in a config; `fields` are the autoencoder's own."""
    settings = {"dtype": dtype, "autoencoder.type": autoencoder.__name__}
    settings |= {f"autoencoder.{name}": value for name, value in asdict(fields).items()}
    settings |= {f"dataset.{name}": value for name, value in asdict(dataset).items() if name not in WITHOUT_EFFECT}
    settings |= {"encode.dtype": config.dtype or dtype, "encode.posterior": config.posterior}
    return settings | ({"encode.seed": config.seed} if config.posterior == "sample" else {})


def check_sizes(autoencoder: Any, rows: Rows, *, there_and_back: bool = False) -> None:
    """Raises: UserError naming the first bucket whose clips the autoencoder cannot take, or not give back."""
    for bucket in dict.fromkeys(bucket for bucket, _ in rows):
        try:
            autoencoder.latent_shape(bucket.num_frames, bucket.height, bucket.width)
            if there_and_back:
                check_gives_back(autoencoder, bucket.num_frames)
        except ValueError as error:
            raise UserError(f"config.bucket_config {bucket.resolution}, {bucket.num_frames} frames: {error}") from error


def this_host() -> Host:
    """Returns the index and the count of JAX's processes."""
    return jax.process_index(), jax.process_count()


def missing(shards: ArrayShards, host: Host) -> tuple[list[int], int]:
    """Returns the shards that are left for a host, and how many of the items of its shards are done."""
    mine = range(host[0], len(shards), host[1])
    info = shards.info()
    todo = [shard for shard in mine if info[shard] is None]
    sizes = {shard: len(range(shards.items)[shards.part(shard)]) for shard in mine}
    return todo, sum(sizes.values()) - sum(sizes[shard] for shard in todo)


def write_latents(writer: LatentWriter, work: ClipWork, host: Host) -> int:
    """Writes the latents of the shards that are left for this host; returns the number of shards.

    Left are also those that lack a clip which can be read now. Raises: UserError when too many clips cannot be read.
    """
    _reopen_mended(writer.latents, work, host)
    todo, done = missing(writer.latents, host)
    parts = [work.rows[writer.latents.part(shard)] for shard in todo]
    with tqdm(total=done + sum(map(len, parts)), initial=done, desc="encode clips", unit="clip") as bar:
        for shard, part in zip(todo, parts, strict=True):
            _write_shard(writer, shard, part, work, bar)
    return len(todo)


def finish(writer: LatentWriter, new_shards: int) -> LatentCache | None:
    """Says what there is now; returns the cache, or None where other processes are not ready.

    Raises: UserError when no clip could be encoded.
    """
    info = [*writer.latents.info(), *writer.texts.info()]
    if None in info:
        print(f"{writer.folder}: {new_shards} new shards; {info.count(None)} of {len(info)} are still to come")
        return None
    writer.sweep()
    cache = LatentCache(writer.folder)
    left_out = list(by_reason(cache.left_out))
    if not len(cache):
        raise UserError(f"none of the {writer.info.clips} clips could be encoded: {'; '.join(left_out)}")
    counts = f"{len(cache)} latents" + (f" and {writer.info.texts} texts" if writer.info.texts else "")
    print(f"{writer.folder}: {counts} in {len(info)} shards, {new_shards} of them new", *left_out, sep="\n  left out: ")
    return cache


def _reopen_mended(shards: ArrayShards, work: ClipWork, host: Host) -> None:
    """Makes those shards of a host unfinished that lack a clip which can be read now: a disk may be back."""
    finished = [(i, found) for i, found in enumerate(shards.info()) if found and i % host[1] == host[0]]
    with ThreadPoolExecutor(READ_THREADS) as pool:
        mended = pool.map(lambda pair: _is_mended(work, work.rows[shards.part(pair[0])], pair[1]), finished)
        for (shard, _), again in zip(finished, mended, strict=True):
            if again:
                shards.reopen(shard)


def _is_mended(work: ClipWork, rows: Rows, found: ShardInfo) -> bool:
    """Returns whether a clip that a shard of these rows lacks can be read now, in all its buckets."""
    for path in {path for path, reason in found.notes.get("left_out", []) if reason != NOT_FINITE}:
        uses = [(row, bucket) for bucket, row in rows if str(work.source.paths[row]) == path]
        if all(work.source.is_readable(row, bucket, 0) for row, bucket in uses):
            return True
    return False


def _write_shard(writer: LatentWriter, shard: int, rows: Rows, work: ClipWork, bar: tqdm) -> None:
    left = Counter(row for _, row in rows)
    with writer.writing_latents(shard) as file:
        for bucket, ids, arrays in _ahead(_encode(rows, work, bar)):
            arrays = {name: np.asarray(values) for name, values in arrays.items()}
            for i, row in enumerate(ids):
                path, found = str(work.source.paths[row]), {name: values[i] for name, values in arrays.items()}
                if not all(np.isfinite(array).all() for array in found.values()):
                    work.source.refuse(row, VideoError(NOT_FINITE))
                    continue
                text_id = NO_TEXT if work.text_of_row is None else int(work.text_of_row[row])
                fps = work.source.facts["fps"][row].item()
                file.add(row, bucket, found.pop("latent"), found, text_id=text_id, fps=fps, path=path)
                left[row] -= 1
        for row in left.elements():
            path = str(work.source.paths[row])
            file.leave_out(path, work.source.bad_clips[path])


def _encode(rows: Rows, work: ClipWork, bar: tqdm) -> Iterator[tuple[Bucket, list[int], dict[str, Array]]]:
    """Yields latents of clips, and of those ends that are wanted alone, that the device may still be computing.

    Ends alone are modes, as the sampler's references are.
    """
    for bucket, ids, clips in read_batches(work.source, rows, work.config.batch_size, bar):
        ends = {"head": clips[:, :1], "tail": clips[:, -1:]} if bucket.num_frames > 1 else {}
        alone = {name: work.codec.encode(ends[name]) for name in work.ends if name in ends}
        yield bucket, ids, {"latent": work.codec.encode(clips, work.config.keys(ids))} | alone


def _ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """Yields every batch after the next one has begun, so that clips are read while the device works."""
    for batch, _ in pairwise(chain(batches, [None])):
        yield batch


def by_reason(left_out: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Yields a line for each of the most frequent reasons."""
    counts = Counter(reason for _, reason in left_out)
    for reason, count in counts.most_common(REASONS_SHOWN):
        paths = [path for path, why in left_out if why == reason]
        more = ", ..." if count > PATHS_SHOWN else ""
        yield f"{count} of the clips: {reason} ({', '.join(paths[:PATHS_SHOWN])}{more})"
    if len(counts) > REASONS_SHOWN:
        yield f"{sum(counts.values()) - sum(n for _, n in counts.most_common(REASONS_SHOWN))} for other reasons"
