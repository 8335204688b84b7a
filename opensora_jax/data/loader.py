"""Batches for one host: Grain maps the steps of a plan through a source that reads single samples in threads.

The loader owns no order and no randomness: step k of the plan gives the same batch after a restart and for
any number of hosts. Nothing raises inside Grain's map, which would break its iterator: a failure travels as a
value and is raised once, by the iterator. Clips that cannot be read are replaced by others of their bucket,
drawn by the sample's seed.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol, runtime_checkable

import grain
import numpy as np
import pyarrow as pa
from absl import logging
from jaxtyping import UInt8

from opensora_jax.config.errors import UserError
from opensora_jax.data.buckets import Bucket
from opensora_jax.data.latents import LatentCache
from opensora_jax.data.plan import Plan, mix
from opensora_jax.data.transforms import frame_start, resize_and_crop, target_fps
from opensora_jax.data.video import VideoError, VideoInfo, read_frames

Batch = dict[str, np.ndarray]

REPLACEMENTS = 20  # draws before a bucket counts as unreadable
MIN_READS = 100  # the rate of bad clips means nothing before


@runtime_checkable
class Source(Protocol):
    """Where samples come from; both methods are called from many threads."""

    def read(self, sample_id: int, bucket: Bucket, seed: int) -> Batch:
        """Returns arrays of shapes fixed by the bucket. Raises VideoError if this sample cannot be used."""
        ...

    def refuse(self, sample_id: int, error: VideoError) -> None:
        """Notes a bad sample. Raises UserError if there are too many."""
        ...


def make_loader(
    plan: Plan,
    source: Source,
    *,
    start_step: int,
    num_steps: int,
    host: tuple[int, int] = (0, 1),
    num_threads: int = 2,
    prefetch: int = 2,
) -> Iterator[Batch]:
    """Returns the batches of steps start_step .. start_step + num_steps - 1 for one host of (index, count).

    A batch stacks the source's arrays over this host's contiguous part of the global batch, with "sample_id"
    [B] and "step" []. `num_threads` samples are read at once; `prefetch` batches are under way or wait (0:
    read when asked).
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
    return _iterate(plan, source, steps, host, max(num_threads, 1), prefetch)


def _iterate(
    plan: Plan, source: Source, steps: range, host: tuple[int, int], num_threads: int, prefetch: int
) -> Iterator[Batch]:
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="read-sample")

    def load(step: int) -> "Batch | _Failure":
        try:
            return _load(plan, source, step, host, pool)
        except Exception as error:
            return _Failure(error)

    options = grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=prefetch)
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
            return source.read(sample_id, bucket, seed) | {"sample_id": np.asarray(sample_id)}
        except VideoError as error:
            source.refuse(sample_id, error)
        sample_id = int(pool[mix(seed, attempt)[0] % np.uint64(len(pool))])
    raise UserError(f"{bucket}: {REPLACEMENTS} samples in a row cannot be read; probe the files again (`dataset meta`)")


class LatentSource:
    """Latents and text embeddings of a cache; sample ids are rows of its index."""

    def __init__(self, cache: LatentCache):
        self.cache = cache

    def read(self, sample_id: int, bucket: Bucket, seed: int) -> Batch:
        """Returns latent [T, H, W, C], text [S, D], pooled [P], fps []."""
        del bucket, seed
        return self.cache.read(sample_id)

    def refuse(self, sample_id: int, error: VideoError) -> None:
        """Latents are never bad one by one."""
        raise error


class ClipSource:
    """Clips decoded from the files of a table; sample ids are its rows.

    Decoded clips stay in memory up to cache_bytes (0: none). `bad_clips` maps the paths that could not be
    read to their reasons; reading raises UserError when more than max_bad_rate of all reads met one.
    """

    def __init__(self, table: pa.Table, *, fps_max: float | int, cache_bytes: int, max_bad_rate: float | int):
        self.fps_max, self.max_bad_rate = fps_max, max_bad_rate
        self.paths = table["path"]
        self.facts = {name: table[name].to_numpy() for name in ("num_frames", "height", "width", "fps", "variable_fps")}
        self.bad_clips: dict[str, str] = {}
        self._reads = self._bad_reads = 0
        self._lock = threading.Lock()
        self._cache = _ClipCache(cache_bytes)

    def read(self, sample_id: int, bucket: Bucket, seed: int) -> Batch:
        """Returns video [T, H, W, 3] in uint8, from a start that the seed draws. Raises VideoError."""
        path = str(self.paths[sample_id])
        with self._lock:
            self._reads += 1
            if path in self.bad_clips:
                raise VideoError(self.bad_clips[path])
        info = VideoInfo(**{name: column[sample_id].item() for name, column in self.facts.items()})
        _, stride = target_fps(info.fps, self.fps_max)
        start = frame_start(info.num_frames, bucket.num_frames, stride, seed)
        key = (sample_id, bucket, start, stride)
        clip = self._cache.get(key)
        if clip is None:
            size, crop = resize_and_crop(
                info.height, info.width, (bucket.height, bucket.width), image=info.num_frames == 1
            )
            clip = read_frames(path, info, start=start, count=bucket.num_frames, stride=stride, size=size, crop=crop)
            self._cache.put(key, clip)
        return {"video": clip}

    def refuse(self, sample_id: int, error: VideoError) -> None:
        """Counts a bad read and logs a clip's first. Raises UserError above max_bad_rate."""
        path = str(self.paths[sample_id])
        with self._lock:
            self._bad_reads += 1
            if path not in self.bad_clips:
                logging.warning("cannot read %s: %s; another clip takes its place", path, error)
            self.bad_clips[path] = str(error)
            too_many = self._bad_reads > self.max_bad_rate * max(self._reads, MIN_READS)
            counts = f"{self._bad_reads} of {self._reads} reads met one of {len(self.bad_clips)} bad clips"
        if too_many:
            raise UserError(
                f"{counts}, more than max_bad_rate = {self.max_bad_rate}; last: {path} ({error}). "
                "Probe the files again (`dataset meta`) or raise max_bad_rate"
            )


class _ClipCache:
    """The most recently used clips, up to a number of bytes; thread-safe."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.bytes = 0
        self._clips: OrderedDict[tuple, UInt8[np.ndarray, "T H W 3"]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple) -> UInt8[np.ndarray, "T H W 3"] | None:
        with self._lock:
            if key in self._clips:
                self._clips.move_to_end(key)
            return self._clips.get(key)

    def put(self, key: tuple, clip: UInt8[np.ndarray, "T H W 3"]) -> None:
        with self._lock:
            if key in self._clips or clip.nbytes > self.max_bytes:
                return
            self._clips[key] = clip
            self.bytes += clip.nbytes
            while self.bytes > self.max_bytes:
                self.bytes -= self._clips.popitem(last=False)[1].nbytes
