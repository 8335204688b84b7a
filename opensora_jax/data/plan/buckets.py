"""Which bucket (resolution, frames, aspect ratio) each row of a table belongs to.

The search runs from the largest resolution and the most frames down, as in Open-Sora 2.0
(opensora/datasets/bucket.py), with the same draws of the same generators for probabilities below 1, but over
whole columns. Unlike the original, the draws are made once and not again in every epoch, so that a plan knows
its steps in advance.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from opensora_jax.config.errors import UserError
from opensora_jax.data.plan.aspect import closest_ratios, resolution_sizes
from opensora_jax.data.plan.draws import Generators
from opensora_jax.data.plan.fit import Level, Rows, Table, length, parse_line, read_rows
from opensora_jax.data.plan.reasons import EmptyLine, Unassigned, explain, why_empty

BLOCK = 1 << 18  # rows at a time: few enough for a core's cache, many enough for NumPy
THREADS = 2  # NumPy lets other threads run during its loops


@dataclass(frozen=True)
class Bucket:
    """One shape of batches; height and width in pixels, batch_size per data shard."""

    resolution: str
    aspect_ratio: str
    num_frames: int
    height: int
    width: int
    batch_size: int

    def __str__(self) -> str:
        return f"{self.resolution} {self.aspect_ratio}, {self.num_frames} frames of {self.height}x{self.width}"


class Assignment(NamedTuple):
    """Row -> index into `buckets`, or -1; the reasons for the -1s, most frequent first; lines without rows."""

    bucket: Int[np.ndarray, " N"]
    buckets: tuple[Bucket, ...]
    unassigned: tuple[Unassigned, ...]
    empty: tuple[EmptyLine, ...] = ()


class Buckets:
    """The buckets of a `bucket_config` as in the original: {"256px": {33: (1.0, 12), 1: (0.5, 45)}}.

    A line is frames: (keep, batch_size) or frames: ((keep, skip), batch_size): the chance that a row which
    fits stays, else it goes on to the next resolution; and the chance that it goes on to fewer frames first.
    Raises UserError.
    """

    def __init__(self, bucket_config: Mapping[str, Any], *, spatial_unit: int, fps_max: float | int):
        if fps_max <= 0:
            raise UserError(f"fps_max is a frame rate above 0: got {fps_max}; use 24, or 999 for no limit")
        self.fps_max = fps_max
        sizes = {name: resolution_sizes(name, spatial_unit=spatial_unit) for name in bucket_config}
        self.levels: list[Level] = []
        buckets: list[Bucket] = []
        for name in sorted(bucket_config, key=lambda name: sizes[name][0], reverse=True):
            for frames in sorted(bucket_config[name], reverse=True):
                keep, skip, batch_size = parse_line(name, frames, bucket_config[name][frames])
                pixels, ratios = sizes[name]
                self.levels.append(Level(name, pixels, frames, keep, skip, tuple(ratios), len(buckets)))
                buckets += [Bucket(name, ar, frames, h, w, batch_size) for ar, (h, w) in ratios.items()]
        if not buckets:
            raise UserError('bucket_config is empty; give it lines such as {"256px": {33: (1.0, 12)}}')
        self.buckets = tuple(buckets)

    def assign(self, table: Table, *, seed: int) -> Assignment:
        """Returns the bucket of every row; rows whose status is not "ok" get none.

        Columns: num_frames, height, width, fps (NaN for images) and, if there, status. The generator of row i
        is `default_rng(seed + i * len(buckets))`, as in the original's first epoch. Raises UserError if no
        row fits.
        """
        count = length(table)
        if any(level.by_chance for level in self.levels) and not 0 <= seed < 2**64 - count * len(self.buckets):
            raise UserError(f"the draws for probabilities below 1 need a seed from 0 to 2**63 - 1: got {seed}")
        found = np.empty(count, np.min_scalar_type(-len(self.buckets) - 1))

        def search(first: int) -> Rows:
            rows = read_rows(table, slice(first, first + BLOCK), self.fps_max)
            place = found[first : first + BLOCK]
            place[:] = self._search(rows, _Draws(first, len(place), seed, len(self.buckets)))
            return rows.take(place < 0)

        with ThreadPoolExecutor(THREADS) as pool:
            left = list(pool.map(search, range(0, count, BLOCK)))
        reasons = explain(Rows(*map(np.concatenate, zip(*left, strict=True))), self.levels) if left else ()
        unassigned = tuple(sorted(reasons, key=lambda reason: -reason.rows))
        if not (found >= 0).any():
            raise UserError(self._nothing_fits(count, unassigned))
        return Assignment(found, self.buckets, unassigned, self._empty_lines(found, table))

    def _search(self, rows: Rows, draws: "_Draws") -> Int[np.ndarray, " N"]:
        found = np.full(len(rows.ok), -1, np.int64)
        for _, group in groupby(self.levels, key=lambda level: level.resolution):
            levels = list(group)
            fits = np.flatnonzero((found < 0) & rows.ok & rows.covers(levels[0].pixels))
            image = rows.frames[fits] == 1
            kept = _keep_videos(rows.frames, fits[~image], [level for level in levels if level.num_frames > 1], draws)
            for level in levels:
                if level.num_frames == 1:
                    images = fits[image]
                    kept.append((level.first, images[draws.below(images, level.keep)]))
            chosen = np.concatenate([ids for _, ids in kept])
            first = np.repeat([first for first, _ in kept], [len(ids) for _, ids in kept])
            found[chosen] = first + closest_ratios(rows.height[chosen], rows.width[chosen], levels[0].ratios)
        return found

    def _empty_lines(self, found: Int[np.ndarray, " N"], table: Table) -> tuple[EmptyLine, ...]:
        counts = np.bincount(found[found >= 0], minlength=len(self.buckets))
        empty = [level for level in self.levels if not counts[level.first : level.first + len(level.ratios)].any()]
        large, fits = np.zeros((2, len(empty)), np.int64)
        for first in range(0, len(found), BLOCK) if empty else ():
            rows = read_rows(table, slice(first, first + BLOCK), self.fps_max)
            for i, level in enumerate(empty):
                covers = rows.ok & rows.covers(level.pixels)
                long = rows.frames == 1 if level.num_frames == 1 else rows.frames >= level.num_frames
                large[i] += np.count_nonzero(covers)
                fits[i] += np.count_nonzero(covers & long)
        return tuple(map(why_empty, empty, large.tolist(), fits.tolist()))

    def _nothing_fits(self, total: int, unassigned: tuple[Unassigned, ...]) -> str:
        if total == 0:
            return "the table has no rows; give it at least one video"
        easiest = min(self.buckets, key=lambda b: (b.height * b.width, b.num_frames == 1, b.num_frames))
        counts = "; ".join(map(str, unassigned))
        remedies = ", or ".join(dict.fromkeys(why.remedy for why in unassigned))
        nearest = f"the nearest bucket is {easiest}"
        return f"none of the {total} samples fits a bucket: {counts}; {nearest}; {remedies}"


def _keep_videos(
    frames: Int[np.ndarray, " N"], videos: Int[np.ndarray, " M"], levels: list[Level], draws: "_Draws"
) -> list[tuple[int, Int[np.ndarray, " K"]]]:
    """Returns (first bucket, the videos that stay) of each line; the other videos leave this resolution.

    A video enters at the first line for which it is long enough, and goes on as far as `skip` takes it.
    """
    fewest = np.array([level.num_frames for level in reversed(levels)], np.int64)
    entry = len(levels) - np.searchsorted(fewest, frames[videos], side="right")
    draws.prepare(videos[np.array([*(level.by_chance for level in levels), False])[entry]])
    order = np.argsort(entry.astype(np.min_scalar_type(len(levels))), kind="stable")  # small types sort in linear time
    ends = np.cumsum(np.bincount(entry, minlength=len(levels)))
    kept, going_on = [], videos[:0]
    for level, arrived in zip(levels, np.split(videos[order], ends), strict=False):
        here = np.concatenate([going_on, arrived])
        skipped = draws.below(here, level.skip) if level.skip is not None else np.zeros(len(here), bool)
        here, going_on = here[~skipped], here[skipped]
        kept.append((level.first, here[draws.below(here, level.keep)]))
    return kept


class _Draws:
    """The draws of the rows of a block, each from its own generator."""

    def __init__(self, first: int, count: int, seed: int, stride: int):
        rows = np.arange(first, first + count, dtype=np.uint64)
        self.generators = Generators(np.uint64(seed % 2**64) + rows * np.uint64(stride))
        self.prepare = self.generators.make

    def below(self, rows: Int[np.ndarray, " M"], chance: float | int) -> Bool[np.ndarray, " M"]:
        """Returns whether each row's next draw is below the chance; a certain chance draws nothing."""
        if chance >= 1:
            return np.ones(len(rows), bool)
        return self.generators.random(rows) <= chance
