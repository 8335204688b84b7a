"""Batches for one host: Grain maps the steps of a plan through a source that reads single samples in threads.

The loader owns no order and no randomness: step k of the plan gives the same batch after a restart and for
any number of hosts. Nothing raises inside Grain's map, which would break its iterator: a failure travels as a
value and is raised once, by the iterator. Clips that cannot be read are replaced by others of their bucket,
drawn by the sample's seed, and marked.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import grain
import numpy as np

from opensora_jax.config.errors import UserError
from opensora_jax.data.cache.latents import LatentCache
from opensora_jax.data.media.video import VideoError
from opensora_jax.data.plan.buckets import Bucket
from opensora_jax.data.plan.plan import Plan, mix

Batch = dict[str, np.ndarray]

REPLACEMENTS = 20  # draws before a bucket counts as unreadable


@dataclass(frozen=True)
class LoaderConfig:
    """A config's `loader` section, for each host: samples read at a time (-1: one per core), and batches read ahead."""

    num_workers: int
    prefetch: int

    def __post_init__(self):
        """Refuse what cannot run."""
        if self.num_workers == 0 or self.num_workers < -1:
            raise ValueError(f"num_workers is at least 1, or -1 for one per core: got {self.num_workers}.")
        if self.prefetch < 0:
            raise ValueError(f"prefetch is a number of batches, at least 0: got {self.prefetch}.")

    @property
    def num_threads(self) -> int:
        """Samples read at a time on this machine."""
        return (os.cpu_count() or 1) if self.num_workers == -1 else self.num_workers


@runtime_checkable
class Source(Protocol):
    """Where samples come from; both methods are called from many threads."""

    def read(self, sample_id: int, bucket: Bucket, seed: int) -> Batch:
        """Returns arrays of shapes fixed by the bucket. Raises VideoError if this sample cannot be used."""
        ...

    def refuse(self, sample_id: int, error: VideoError) -> None:
        """Notes a bad sample. Raises UserError if there are too many."""
        ...


DEFAULT = LoaderConfig(num_workers=2, prefetch=2)


def make_loader(
    plan: Plan,
    source: Source,
    *,
    start_step: int,
    num_steps: int,
    host: tuple[int, int] = (0, 1),
    config: LoaderConfig = DEFAULT,
) -> Iterator[Batch]:
    """Returns the batches of steps start_step .. start_step + num_steps - 1 for one host of (index, count).

    A batch stacks the source's arrays over this host's contiguous part of the global batch, with "sample_id" [B],
    "replaced" [B] (the sample stands in for one that cannot be read) and "step" [].
    """
    index, count = host
    if not 0 <= index < count:
        raise ValueError(f"host {index} of {count}")
    for bucket in plan.buckets:
        if plan.batch_size(bucket) % count:
            raise UserError(
                f"{bucket}: a global batch of {plan.batch_size(bucket)} does not divide among {count} hosts; "
                f"choose a batch size and data shards whose product is a multiple of {count}"
            )
    steps = range(start_step, start_step + num_steps)
    return _iterate(plan, source, steps, host, config)


def example_batches(plan: Plan, source: Source, *, host: tuple[int, int] = (0, 1)) -> dict[str, Batch]:
    """Returns for every bucket a batch as one host gets it, all of one sample; it takes no memory."""
    found = {}
    for bucket in plan.buckets:
        sample = _read_or_replace(plan, source, bucket, int(plan.samples(bucket)[0]), seed=0)
        share = plan.batch_size(bucket) // host[1]
        found[str(bucket)] = {name: np.broadcast_to(value, (share, *value.shape)) for name, value in sample.items()}
        found[str(bucket)]["step"] = np.asarray(0)
    return found


def _iterate(plan: Plan, source: Source, steps: range, host: tuple[int, int], config: LoaderConfig) -> Iterator[Batch]:
    pool = ThreadPoolExecutor(config.num_threads, thread_name_prefix="read-sample")

    def load(step: int) -> "Batch | _Failure":
        try:
            return _load(plan, source, step, host, pool)
        except Exception as error:
            return _Failure(error)

    options = grain.ReadOptions(num_threads=config.prefetch, prefetch_buffer_size=config.prefetch)
    batches = iter(grain.MapDataset.range(steps.start, steps.stop).map(load).to_iter_dataset(options))
    try:
        for batch in batches:
            if isinstance(batch, _Failure):
                raise batch.error
            yield batch
    finally:
        batches.close()
        pool.shutdown(cancel_futures=True)


class _Failure(NamedTuple):
    error: Exception


def _load(plan: Plan, source: Source, step: int, host: tuple[int, int], pool: ThreadPoolExecutor) -> Batch:
    bucket, ids, seeds = plan[step]
    share = len(ids) // host[1]
    mine = slice(host[0] * share, (host[0] + 1) * share)

    def read(sample_id: int, seed: int) -> Batch:
        return _read_or_replace(plan, source, bucket, sample_id, seed)

    samples = list(pool.map(read, ids[mine].tolist(), seeds[mine].tolist()))
    return {name: np.stack([s[name] for s in samples]) for name in samples[0]} | {"step": np.asarray(step)}


def _read_or_replace(plan: Plan, source: Source, bucket: Bucket, sample_id: int, seed: int) -> Batch:
    pool = plan.samples(bucket)
    for attempt in range(REPLACEMENTS):
        try:
            found = source.read(sample_id, bucket, seed)
            return found | {"sample_id": np.asarray(sample_id), "replaced": np.asarray(attempt > 0)}
        except VideoError as error:
            source.refuse(sample_id, error)
        sample_id = int(pool[mix(seed, attempt)[0] % np.uint64(len(pool))])
    raise UserError(
        f"{bucket}: {REPLACEMENTS} samples in a row cannot be read. Bring the files back to go on; a table without "
        "them (`dataset meta`) needs another workdir"
    )


class LatentSource:
    """Latents and text embeddings of a cache; sample ids are rows of its index."""

    def __init__(self, cache: LatentCache):
        self.cache = cache

    def read(self, sample_id: int, bucket: Bucket, seed: int) -> Batch:
        """Returns latent [T, H, W, C], text [S, D], pooled [P], fps [], and ends of clips where the cache has them."""
        del bucket, seed
        return self.cache.read(sample_id)

    def refuse(self, sample_id: int, error: VideoError) -> None:
        """Latents are never bad one by one."""
        raise error
