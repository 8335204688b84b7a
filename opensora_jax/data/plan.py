"""What every step reads: `plan[step]` is a pure function of table, buckets, seed, data shards and step.

All hosts hold the same plan and take their slice of its global batches, so a restart needs one integer and a
change of host count changes nothing. Each bucket is an endless stream, one shuffle of its samples after the
other, cut into batches: the leftover of an epoch opens the next one instead of being dropped. Only integer
hashes are drawn, no generator of NumPy, whose streams may change between versions.
"""

import hashlib
import threading
from functools import lru_cache
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from jaxtyping import Int, UInt64

from opensora_jax.config.errors import UserError
from opensora_jax.data.buckets import Assignment, Bucket, Table, Unassigned

SMALL_BUCKETS = ("error", "drop", "repeat")


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


class BucketReport(NamedTuple):
    """One bucket of a plan: carried is the first epoch's leftover, repeated the copies within each batch."""

    bucket: Bucket
    samples: int
    steps: int
    carried: int
    dropped: int
    repeated: int


class Plan:
    """The global batches of all steps, thread-safe: batch_size * data_shards samples of one bucket each.

    A sample can come twice in the one batch that spans two epochs. A bucket with fewer samples than its batch
    is an error that names it, unless `small_buckets` is "drop", or "repeat" (its batches then hold samples
    several times).
    """

    def __init__(self, table: Table, buckets: Assigner, *, seed: int, data_shards: int, small_buckets: str = "error"):
        if small_buckets not in SMALL_BUCKETS:
            raise UserError(f'small_buckets is one of {", ".join(SMALL_BUCKETS)}: got "{small_buckets}"')
        if data_shards < 1:
            raise UserError(f"data_shards is at least 1: got {data_shards}")
        assignment = buckets.assign(table, seed=seed)
        self.seed, self.data_shards, self.small_buckets = seed, data_shards, small_buckets
        self.unassigned: tuple[Unassigned, ...] = assignment.unassigned
        self.hash = self._fingerprint(assignment, table)
        groups = _group(assignment)
        small = [bucket for bucket, rows in groups if len(rows) < self.batch_size(bucket)]
        if small and small_buckets == "error":
            raise UserError(self._too_small(groups, small))
        self._dropped = [(b, rows) for b, rows in groups if b in small and small_buckets == "drop"]
        kept = [(b, rows) for b, rows in groups if not (b in small and small_buckets == "drop")]
        if not kept:
            raise UserError(self._too_small(groups, small))
        self.buckets = tuple(bucket for bucket, _ in kept)
        self._rows = dict(kept)
        self._samples = np.array([len(rows) for _, rows in kept])
        self._batch = np.array([self.batch_size(bucket) for bucket in self.buckets])
        self._lock = threading.Lock()
        self._batches = lru_cache(maxsize=2)(self._shuffled_batches)
        self._order = lru_cache(maxsize=3 * len(kept))(self._shuffled_rows)

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
        """Returns a row per bucket with samples, the dropped last; `unassigned` has the other samples."""
        rows = [
            BucketReport(bucket, n, n // B, n % B, 0, max(B - n, 0))
            for bucket, n, B in zip(self.buckets, self._samples.tolist(), self._batch.tolist(), strict=True)
        ]
        return rows + [BucketReport(bucket, len(ids), 0, 0, len(ids), 0) for bucket, ids in self._dropped]

    def describe(self) -> str:
        """Returns the report as lines of text for the log."""
        lines = [f"plan {self.hash}: {len(self)} steps in the first epoch, {self.data_shards} data shard(s)"]
        for row in self.report():
            notes = {"carried": row.carried, "dropped": row.dropped, "repeated in each batch": row.repeated}
            extra = "".join(f", {count} {name}" for name, count in notes.items() if count)
            size = self.batch_size(row.bucket)
            lines.append(f"  {row.bucket}: {row.samples} samples, {row.steps} x {size}{extra}")
        return "\n".join(lines + [f"  no bucket: {reason}" for reason in self.unassigned])

    def _steps_before(self, epoch: int) -> int:
        return int((epoch * self._samples // self._batch).sum())

    def _shuffled_batches(self, epoch: int) -> Int[np.ndarray, "2 S"]:
        """Returns for each step of the epoch a bucket's index and the number of a batch in its stream."""
        first, end = (e * self._samples // self._batch for e in (epoch, epoch + 1))
        which = np.repeat(np.arange(len(first)), end - first)
        batch = np.concatenate([np.arange(a, b) for a, b in zip(first, end, strict=True)])
        shuffled = which[np.argsort(mix(self.seed, 1, epoch, which, batch), kind="stable")]
        in_order = np.empty_like(batch)
        in_order[np.argsort(shuffled, kind="stable")] = batch  # each bucket's own batches come in order
        return np.stack([shuffled, in_order])

    def _shuffled_rows(self, which: int, epoch: int) -> Int[np.ndarray, " N"]:
        rows = self._rows[self.buckets[which]]
        return rows[np.argsort(mix(self.seed, 2, epoch, rows), kind="stable")]

    def _read(self, which: int, batch: int) -> Step:
        start, size, B = batch * self._batch[which], self._samples[which], self._batch[which]
        epochs, places = np.divmod(np.arange(start, start + B), size)
        ids = np.empty(B, np.int64)
        for epoch in np.unique(epochs).tolist():
            ids[epochs == epoch] = self._order(which, epoch)[places[epochs == epoch]]
        return Step(self.buckets[which], ids, mix(self.seed, 3, epochs, ids))

    def _too_small(self, groups: list[tuple[Bucket, np.ndarray]], small: list[Bucket]) -> str:
        counts = [f"{b} has {len(rows)} for a batch of {self.batch_size(b)}" for b, rows in groups if b in small]
        shown = "; ".join(counts[:3]) + (f"; and {len(counts) - 3} more" if len(counts) > 3 else "")
        return (
            f"{len(small)} bucket(s) have too few samples for a global batch over {self.data_shards} data "
            f"shard(s): {shown}. Lower their batch size in bucket_config, or give them samples (more data, "
            'or fewer lines and ratios, as in "256px_ar1:1"), or set small_buckets to "repeat" or "drop"'
        )

    def _fingerprint(self, assignment: Assignment, table: Table) -> str:
        settings = (1, assignment.buckets, self.seed, self.data_shards, self.small_buckets)
        digest = hashlib.sha256(repr(settings).encode())
        digest.update(assignment.bucket.astype("<i8").tobytes())
        if isinstance(table, pa.Table) and "path" in table.column_names:
            for chunk in table["path"].chunks:
                digest.update("".join(f"{path}\n" for path in chunk.to_pylist()).encode())
        return digest.hexdigest()[:16]


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


def _group(assignment: Assignment) -> list[tuple[Bucket, np.ndarray]]:
    """Returns the buckets that have rows, in the order of the assignment, and their rows, ascending."""
    small = assignment.bucket.astype(np.min_scalar_type(-len(assignment.buckets) - 1))  # 16 bits sort in linear time
    order = np.argsort(small, kind="stable")
    sorted_bucket = assignment.bucket[order]
    used = np.unique(sorted_bucket[sorted_bucket >= 0])
    ends = np.searchsorted(sorted_bucket, used, side="right")
    starts = np.searchsorted(sorted_bucket, used, side="left")
    return [
        (assignment.buckets[b], order[start:end]) for b, start, end in zip(used.tolist(), starts, ends, strict=True)
    ]
