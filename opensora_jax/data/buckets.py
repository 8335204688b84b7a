"""Which bucket (resolution, frames, aspect ratio) each row of a table belongs to.

The search runs from the largest resolution and the most frames down, as in Open-Sora 2.0
(opensora/datasets/bucket.py), with the same draws of the same generators for probabilities below 1, but over
whole columns. Unlike the original, the draws are made once and not again in every epoch, so that a plan knows
its steps in advance.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int

from opensora_jax.config.errors import UserError
from opensora_jax.data.aspect import closest_ratios, resolution_sizes
from opensora_jax.data.transforms import frame_intervals

LEAST_SIZE = 0.8  # a frame may be scaled up a little: to a bucket of at most 1 / 0.8 times its pixels

Table: TypeAlias = pa.Table | Mapping[str, np.ndarray]


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


class Unassigned(NamedTuple):
    """Why `rows` rows are in no bucket, how far the best of them is, and what would help."""

    reason: str
    rows: int
    best: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.rows} {self.reason}" + (f" ({self.best})" if self.best else "")


class Assignment(NamedTuple):
    """Row -> index into `buckets`, or -1; and the reasons for the -1s, most frequent first."""

    bucket: Int[np.ndarray, " N"]
    buckets: tuple[Bucket, ...]
    unassigned: tuple[Unassigned, ...]


class _Level(NamedTuple):
    """One line of bucket_config: keep and skip are probabilities, first the index of its first bucket."""

    resolution: str
    pixels: int
    num_frames: int
    keep: float | int
    skip: float | int | None
    ratios: tuple[str, ...]
    first: int


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
        self.levels: list[_Level] = []
        buckets: list[Bucket] = []
        for name in sorted(bucket_config, key=lambda name: sizes[name][0], reverse=True):
            for frames in sorted(bucket_config[name], reverse=True):
                keep, skip, batch_size = _parse_line(name, frames, bucket_config[name][frames])
                pixels, ratios = sizes[name]
                self.levels.append(_Level(name, pixels, frames, keep, skip, tuple(ratios), len(buckets)))
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
        rows = _read_rows(table, self.fps_max)
        found = self._search(rows, _Draws(len(rows.ok), seed, self))
        reasons = _explain(rows.take(found < 0), self.levels)
        unassigned = tuple(sorted(reasons, key=lambda reason: -reason.rows))
        if not (found >= 0).any():
            raise UserError(self._nothing_fits(len(found), unassigned))
        return Assignment(found, self.buckets, unassigned)

    def _search(self, rows: "_Rows", draws: "_Draws") -> Int[np.ndarray, " N"]:
        found = np.full(len(rows.ok), -1, np.int64)
        for _, group in groupby(self.levels, key=lambda level: level.resolution):
            levels = list(group)
            fits = np.flatnonzero((found < 0) & rows.ok & rows.covers(levels[0].pixels))
            images, videos = fits[rows.frames[fits] == 1], fits[rows.frames[fits] != 1]
            for level in levels:
                if level.num_frames == 1:
                    kept = images[draws.below(images, level.keep)]
                else:
                    kept, videos = _split_videos(rows, videos, level, draws)
                found[kept] = level.first + closest_ratios(rows.height[kept], rows.width[kept], level.ratios)
        return found

    def _nothing_fits(self, total: int, unassigned: tuple[Unassigned, ...]) -> str:
        if total == 0:
            return "the table has no rows; give it at least one video"
        easiest = min(self.buckets, key=lambda b: (b.height * b.width, b.num_frames == 1, b.num_frames))
        counts = "; ".join(map(str, unassigned))
        remedies = ", or ".join(dict.fromkeys(why.remedy for why in unassigned))
        nearest = f"the nearest bucket is {easiest}"
        return f"none of the {total} samples fits a bucket: {counts}; {nearest}; {remedies}"


def _split_videos(
    rows: "_Rows", videos: Int[np.ndarray, " M"], level: _Level, draws: "_Draws"
) -> tuple[Int[np.ndarray, " K"], Int[np.ndarray, " R"]]:
    """Returns the videos that stay and those that go on to fewer frames; the rest leave this resolution."""
    going_on = np.ones(len(videos), bool)
    here = np.flatnonzero(rows.frames[videos] >= level.num_frames)
    if level.skip is not None:
        here = here[~draws.below(videos[here], level.skip)]
    going_on[here] = False
    here = videos[here]
    return here[draws.below(here, level.keep)], videos[going_on]


class _Rows(NamedTuple):
    """The columns that decide; frames are counted after thinning: every `interval`-th stays."""

    frames: Int[np.ndarray, " N"]
    interval: Int[np.ndarray, " N"]
    height: Int[np.ndarray, " N"]
    width: Int[np.ndarray, " N"]
    area: Int[np.ndarray, " N"]
    ok: Bool[np.ndarray, " N"]

    def covers(self, pixels: int) -> Bool[np.ndarray, " N"]:
        return self.area >= pixels * LEAST_SIZE

    def take(self, mask: Bool[np.ndarray, " N"]) -> "_Rows":
        return _Rows(*(column[mask] for column in self))


def _read_rows(table: Table, fps_max: float | int) -> _Rows:
    frames, height, width = (np.asarray(table[name], np.int64) for name in ("num_frames", "height", "width"))
    interval = frame_intervals(np.asarray(table["fps"], np.float64), fps_max)
    names = table.column_names if isinstance(table, pa.Table) else table
    ok = np.asarray(table["status"]) == "ok" if "status" in names else np.ones(len(frames), bool)
    return _Rows(frames // interval, interval, height, width, height * width, ok)


class _Draws:
    """The uniform draws of every row's own generator, in order; a row's are made when first needed."""

    def __init__(self, rows: int, seed: int, buckets: Buckets):
        chances = [chance for level in buckets.levels for chance in (level.keep, level.skip)]
        self.per_row = sum(chance is not None and chance < 1 for chance in chances)
        self.seed, self.stride = seed, len(buckets.buckets)
        self.used = np.zeros(rows, np.int64)
        self.slot = np.full(rows, -1, np.int64)
        self.values = np.zeros((0, self.per_row))

    def below(self, rows: Int[np.ndarray, " M"], chance: float | int) -> Bool[np.ndarray, " M"]:
        """Returns whether each row's next draw is below the chance; a certain chance draws nothing."""
        if chance >= 1:
            return np.ones(len(rows), bool)
        fresh = rows[self.slot[rows] < 0]
        self.slot[fresh] = len(self.values) + np.arange(len(fresh))
        streams = [np.random.default_rng(self.seed + row * self.stride).random(self.per_row) for row in fresh.tolist()]
        self.values = np.concatenate([self.values, np.reshape(streams, (-1, self.per_row))])
        value = self.values[self.slot[rows], self.used[rows]]
        self.used[rows] += 1
        return value <= chance


def _explain(left: _Rows, levels: list[_Level]) -> Iterator[Unassigned]:
    """Yields the reasons why these rows have no bucket; a row counts for the first reason that holds."""
    smallest = min(level.pixels for level in levels)
    image = left.frames == 1
    least = _least_frames(left, levels)
    has_image = np.any([left.covers(level.pixels) for level in levels if level.num_frames == 1], axis=0)
    reasons = [
        ("marked bad in the table", ~left.ok, "mend or replace those files"),
        (
            f"smaller than {smallest * LEAST_SIZE:.0f} pixels",
            ~left.covers(smallest),
            "use larger frames or a smaller resolution",
        ),
        ("images without a line of 1 frame", image & ~has_image, "use videos or add such a line"),
        (
            "videos without a line of more than 1 frame",
            ~image & (least == 0),
            "use images or add such a line",
        ),
    ]
    for count in np.unique(least[least > 0]).tolist():
        short = ~image & (least == count) & (left.frames < count)
        reasons.append((f"shorter than {count} frames", short, "use longer videos or lines of fewer frames"))
    reasons.append(("left out by a probability below 1", np.ones_like(image), "raise the probabilities"))
    told = np.zeros_like(image)
    for reason, holds, remedy in reasons:
        if (mine := holds & ~told).any():
            yield Unassigned(reason, int(mine.sum()), _best_of(left.take(mine), reason), remedy)
        told |= holds


def _least_frames(rows: _Rows, levels: list[_Level]) -> Int[np.ndarray, " N"]:
    """Returns the fewest frames of a video level for frames of each row's size, 0 if there is none."""
    least = np.zeros_like(rows.frames)
    videos = [level for level in levels if level.num_frames > 1]
    for pixels in {level.pixels for level in videos}:
        frames = min(level.num_frames for level in videos if level.pixels == pixels)
        here = rows.covers(pixels)
        least[here] = np.where(least[here] > 0, np.minimum(least[here], frames), frames)
    return least


def _best_of(rows: _Rows, reason: str) -> str:
    if reason.startswith("shorter"):
        longest = np.argmax(rows.frames)
        frames, interval = rows.frames[longest], rows.interval[longest]
        return f"longest: {frames}" + (f", taking 1 of {interval} to keep to fps_max" if interval > 1 else "")
    if reason.startswith("smaller"):
        largest = np.argmax(rows.area)
        return f"largest: {rows.height[largest]}x{rows.width[largest]}"
    return ""


def _parse_line(resolution: str, frames: Any, line: Any) -> tuple[float | int, float | int | None, int]:
    """Returns (keep, skip, batch size) of one line of bucket_config. Raises UserError."""
    where = f'bucket_config["{resolution}"][{frames}]'
    if not isinstance(frames, int) or frames < 1:
        raise UserError(f"{where}: frames are a whole number of at least 1")
    if not isinstance(line, tuple | list) or len(line) != 2:
        raise UserError(f"{where} = {line!r}: write (keep, batch size) or ((keep, skip), batch size)")
    chances, batch_size = line
    keep, skip = chances if isinstance(chances, tuple | list) and len(chances) == 2 else (chances, None)
    if not all(isinstance(p, int | float) and 0 <= p <= 1 for p in (keep, 0 if skip is None else skip)):
        raise UserError(f"{where}: probabilities lie between 0 and 1: got {chances!r}")
    if skip is not None and frames == 1:
        raise UserError(f"{where}: images have no fewer frames to go on to; write (keep, batch size)")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise UserError(f"{where}: the batch size is a whole number of at least 1: got {batch_size!r}")
    return keep, skip, batch_size
