"""What every step reads: `plan[step]` is a pure function of table, buckets, seed, data shards and step.

All hosts hold the same plan and take their slice of its global batches, so a restart needs one integer and a
change of host count changes nothing. Each bucket is an endless stream, one shuffle of its samples after the
other, cut into batches: the leftover of an epoch opens the next one instead of being dropped. Only integer
hashes are drawn, no generator of NumPy, whose streams may change between versions.
"""

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache, partial
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int, UInt64

from opensora_jax.config.errors import UserError
from opensora_jax.data.plan.buckets import Assignment, Bucket
from opensora_jax.data.plan.digests import Part, clip_names, column_digest, digest
from opensora_jax.data.plan.fit import Table
from opensora_jax.data.plan.plan_report import SMALL_BUCKETS, BucketReport, as_table, missing_ratios, never_a_batch
from opensora_jax.data.plan.reasons import EmptyLine, Unassigned


@runtime_checkable
class Assigner(Protocol):
    """What sorts a table into buckets: `buckets.Buckets`, or `latents.CachedBuckets` for a cache's index."""

    def assign(self, table: Table, *, seed: int) -> Assignment:
        """Returns the bucket of every row."""
        ...


class Step(NamedTuple):
    """A global batch: row numbers of the table, and one well-mixed seed for every sample of every epoch."""

    bucket: Bucket
    sample_ids: Int[np.ndarray, " B"]
    seeds: UInt64[np.ndarray, " B"]


class Plan:
    """The global batches of all steps, thread-safe: batch_size * data_shards samples of one bucket each.

    A sample can come twice in the one batch that spans two epochs. A bucket with fewer samples than its batch
    is an error that names it, unless `small_buckets` is "drop", or "repeat" (its batches then hold samples
    several times); so is a line of bucket_config that no sample reaches, unless it is "drop" or `allow_empty`.

    `hash` tells another plan: it covers all buckets, seed, data shards, small_buckets, and of every row its
    bucket and its clip, named from the folder of all usable clips on (which may be moved), in their order.
    """

    def __init__(
        self,
        table: Table,
        buckets: Assigner,
        *,
        seed: int,
        data_shards: int,
        small_buckets: str = "error",
        allow_empty: bool = False,
    ):
        if small_buckets not in SMALL_BUCKETS:
            raise UserError(f'small_buckets is one of {", ".join(SMALL_BUCKETS)}: got "{small_buckets}"')
        if data_shards < 1:
            raise UserError(f"data_shards is at least 1: got {data_shards}")
        with ThreadPoolExecutor() as pool:
            clips = pool.map(lambda part: column_digest(*part), _clip_columns(table))  # beside the search
            assignment = buckets.assign(table, seed=seed)
        self.seed, self.data_shards, self.small_buckets = seed, data_shards, small_buckets
        self.unassigned: tuple[Unassigned, ...] = assignment.unassigned
        self.empty: tuple[EmptyLine, ...] = assignment.empty
        groups = _group(assignment)
        small = {bucket: len(rows) for bucket, rows in groups if len(rows) < self.batch_size(bucket)}
        small = {} if small_buckets == "repeat" else small
        kept = [(bucket, rows) for bucket, rows in groups if bucket not in small]
        empty = [] if allow_empty else [line for line in self.empty if not line.is_off]
        if not kept or (small_buckets != "drop" and (small or empty)):
            raise UserError(never_a_batch(small, empty, data_shards, small_buckets))
        self._dropped = small
        self.hash = self._fingerprint(assignment, digest(*clips))
        used = {bucket for bucket, _ in groups}
        self._missing = missing_ratios([b for b in assignment.buckets if b not in used], self.empty)
        self.buckets = tuple(bucket for bucket, _ in kept)
        self._rows = dict(kept)
        self._samples = np.array([len(rows) for _, rows in kept])
        self._batch = np.array([self.batch_size(bucket) for bucket in self.buckets])
        self._lock = threading.Lock()
        self._batches = lru_cache(maxsize=2)(self._shuffled_batches)
        self._orders = [lru_cache(maxsize=2)(partial(self._shuffled_rows, which)) for which in range(len(kept))]

    def __len__(self) -> int:
        """Returns the steps of the first epoch, at least 1; a later one has up to one more per bucket."""
        return max(int(self._steps_before(1)), 1)

    def __getitem__(self, step: int) -> Step:
        """Returns the batch of any step >= 0."""
        if step < 0:
            raise IndexError(f"a plan has no step {step}")
        with self._lock:
            epoch = self.epoch(step)
            which, batch = self._batches(epoch)[:, step - self._steps_before(epoch)]
            return self._read(int(which), int(batch))

    def epoch(self, step: int) -> int:
        """Returns the epoch of a step, from 0."""
        low, high = 0, 1
        while self._steps_before(high) <= step:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._steps_before(middle) <= step else (low, middle)
        return low

    def batch_size(self, bucket: Bucket) -> int:
        """Returns the samples of a global batch of this bucket."""
        return bucket.batch_size * self.data_shards

    def samples(self, bucket: Bucket) -> Int[np.ndarray, " N"]:
        """Returns all row numbers that this bucket draws from, ascending."""
        return self._rows[bucket]

    def report(self) -> list[BucketReport]:
        """Returns a row per bucket with samples, the dropped last; `unassigned` and `empty` have the rest."""
        rows = [
            BucketReport(bucket, n, B, n // B, n % B, 0, max(B - n, 0))
            for bucket, n, B in zip(self.buckets, self._samples.tolist(), self._batch.tolist(), strict=True)
        ]
        return rows + [BucketReport(b, n, self.batch_size(b), 0, 0, n, 0) for b, n in self._dropped.items()]

    def describe(self) -> str:
        """Returns the report as a table for the log, with all that the plan leaves out below it."""
        title = f"plan {self.hash}: {len(self)} steps in the first epoch, {self.data_shards} data shard(s)"
        lines = [title, *as_table(self.report()), *self._missing]
        lines += [f"dropped line: {line}" for line in self.empty]
        lines += [f"no bucket: {reason}" for reason in self.unassigned]
        return "\n  ".join(lines)

    def _steps_before(self, epoch: int) -> int:
        return int((epoch * self._samples // self._batch).sum())

    def _shuffled_batches(self, epoch: int) -> Int[np.ndarray, "2 S"]:
        """Returns for each step of the epoch a bucket's index and the number of a batch in its stream."""
        first, end = (e * self._samples // self._batch for e in (epoch, epoch + 1))
        which = np.repeat(np.arange(len(first)), end - first)
        batch = np.concatenate([np.arange(a, b) for a, b in zip(first, end, strict=True)])
        shuffled = which[np.argsort(mix(self.seed, 1, epoch, which, batch), kind="stable")]
        shuffled = shuffled.astype(np.min_scalar_type(len(first)))  # 16 bits sort in linear time
        in_order = np.empty_like(batch)
        in_order[np.argsort(shuffled, kind="stable")] = batch  # each bucket's own batches come in order
        return np.stack([shuffled, in_order])

    def _shuffled_rows(self, which: int, epoch: int) -> Int[np.ndarray, " N"]:
        rows = self._rows[self.buckets[which]]
        return rows[np.argsort(mix(self.seed, 2, epoch, rows))]  # no two rows of a bucket share a hash

    def _read(self, which: int, batch: int) -> Step:
        start, size, B = batch * self._batch[which], self._samples[which], self._batch[which]
        epochs, places = np.divmod(np.arange(start, start + B), size)
        ids = np.empty(B, np.int64)
        for epoch in np.unique(epochs).tolist():
            ids[epochs == epoch] = self._orders[which](epoch)[places[epochs == epoch]]
        return Step(self.buckets[which], ids, mix(self.seed, 3, epochs, ids))

    def _fingerprint(self, assignment: Assignment, clips: str) -> str:
        settings = (2, assignment.buckets, self.seed, self.data_shards, self.small_buckets)
        hashes = hashlib.sha256(repr(settings).encode())
        hashes.update(assignment.bucket.astype("<i4").data)
        hashes.update(clips.encode())
        return hashes.hexdigest()[:16]


class Rounds(Plan):
    """The same batches in rounds: one of every bucket, those with most samples first, until each sample was read once.

    So a few steps see as many buckets as they can. A bucket's last batch is filled up with samples of its next epoch.
    """

    def __len__(self) -> int:
        """Returns the steps after which every sample was read."""
        return int(self._counts.sum())

    def __getitem__(self, step: int) -> Step:
        """Returns the batch of a step below the length."""
        if not 0 <= step < len(self):
            raise IndexError(f"a plan of {len(self)} steps has no step {step}")
        which, batch = self._rounds[:, step]
        with self._lock:
            return self._read(int(which), int(batch))

    @cached_property
    def _counts(self) -> Int[np.ndarray, " K"]:
        return -(-self._samples // self._batch)

    @cached_property
    def _rounds(self) -> Int[np.ndarray, "2 S"]:
        """For each step a bucket's index and the number of a batch in its stream."""
        which = np.repeat(np.arange(len(self._counts)), self._counts)
        batch = np.concatenate([np.arange(count) for count in self._counts])
        return np.stack([which, batch])[:, np.lexsort((which, -self._samples[which], batch))]


def mix(*parts: int | np.ndarray) -> UInt64[np.ndarray, "..."]:
    """Returns a hash of the parts, broadcast to at least one axis; every bit depends on every part.

    Source: the finaliser of SplitMix64 (Steele, Lea, Flood 2014), chained over the parts.
    """
    state = np.zeros(1, np.uint64)
    for part in parts:
        state = state ^ np.asarray(part).astype(np.uint64)
        state = state + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def _group(assignment: Assignment) -> list[tuple[Bucket, Int[np.ndarray, " K"]]]:
    """Returns the buckets that have rows, in the order of the assignment, and their rows, ascending."""
    place = assignment.bucket.astype(np.min_scalar_type(-len(assignment.buckets) - 1), copy=False)
    rows = np.argsort(place, kind="stable")  # linear time for 16 bits
    rows = rows.astype(np.int32 if len(rows) < 2**31 else np.int64)
    ends = np.cumsum(np.bincount(place.astype(np.intp) + 1, minlength=len(assignment.buckets) + 1))
    groups = np.split(rows, ends)[1:-1]
    return [(bucket, part) for bucket, part in zip(assignment.buckets, groups, strict=True) if len(part)]


def _clip_columns(table: Table) -> list[Part]:
    """Returns what says which clips the rows are, as far as the table does."""
    if not isinstance(table, pa.Table) or "path" not in table.column_names:
        return []
    record = [Part(pc.cast(table["record"], pa.int64()))] if "record" in table.column_names else []
    return clip_names(table) + record
