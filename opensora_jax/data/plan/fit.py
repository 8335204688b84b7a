"""What decides whether a row of a table fits a line of bucket_config: columns, pixels, frames after thinning.

Rows are read a part at a time, straight from a table's columns, so that a table of millions of rows costs no
copy of itself. Rules as in Open-Sora 2.0, opensora/datasets/bucket.py.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int

from opensora_jax.config.errors import UserError
from opensora_jax.data.media.transforms import frame_intervals
from opensora_jax.data.plan.auto import AUTO

LEAST_SIZE = 0.8  # a frame may be scaled up a little: to a bucket of at most 1 / 0.8 times its pixels

Table: TypeAlias = pa.Table | Mapping[str, np.ndarray]


class Level(NamedTuple):
    """One line of bucket_config: keep and skip are probabilities, first the index of its first bucket."""

    resolution: str
    pixels: int
    num_frames: int
    keep: float | int
    skip: float | int | None
    ratios: tuple[str, ...]
    first: int

    @property
    def by_chance(self) -> bool:
        """Whether a row that comes to this line may need a draw."""
        return self.keep < 1 or (self.skip is not None and self.skip < 1)


class Rows(NamedTuple):
    """The columns that decide; frames are counted after thinning: every `interval`-th stays."""

    frames: Int[np.ndarray, " N"]
    interval: Int[np.ndarray, " N"]
    height: Int[np.ndarray, " N"]
    width: Int[np.ndarray, " N"]
    area: Int[np.ndarray, " N"]
    ok: Bool[np.ndarray, " N"]

    def covers(self, pixels: int) -> Bool[np.ndarray, " N"]:
        """Returns which rows have frames large enough for a resolution of so many pixels."""
        return self.area >= pixels * LEAST_SIZE

    def take(self, mask: Bool[np.ndarray, " N"]) -> "Rows":
        """Returns the chosen rows."""
        return Rows(*(column[mask] for column in self))


def length(table: Table) -> int:
    """Returns the number of rows."""
    return len(table["num_frames"])


def read_rows(table: Table, part: slice, fps_max: float | int) -> Rows:
    """Returns a part of num_frames, height, width, fps (NaN for images) and, if there, status ("ok" or not)."""
    names = table.column_names if isinstance(table, pa.Table) else table
    frames, height, width = (np.asarray(table[name][part], np.int64) for name in ("num_frames", "height", "width"))
    interval = frame_intervals(np.asarray(table["fps"][part], np.float64), fps_max)
    ok = is_ok(table["status"][part]) if "status" in names else np.ones(len(frames), bool)
    return Rows(frames // interval, interval, height, width, height * width, ok)


def is_ok(status: pa.ChunkedArray | np.ndarray) -> Bool[np.ndarray, " N"]:
    """Returns which values of a status are those of usable rows."""
    if isinstance(status, np.ndarray):
        return status == "ok"
    return np.asarray(pc.fill_null(pc.equal(status.cast(pa.string()), "ok"), False))


def parse_line(resolution: str, frames: Any, line: Any) -> tuple[float | int, float | int | None, int]:
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
    if batch_size == AUTO:
        raise UserError(f'{where}: the batch size "{AUTO}" is for `train`; give a whole number here')
    if not isinstance(batch_size, int) or batch_size < 1:
        raise UserError(f"{where}: the batch size is a whole number of at least 1: got {batch_size!r}")
    return keep, skip, batch_size
