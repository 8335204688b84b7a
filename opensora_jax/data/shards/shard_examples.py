"""The clips of a table as records of a TFDS data set: encoded as they are, with captions, facts and scores."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tensorflow_datasets as tfds
from jaxtyping import Int

from opensora_jax.config.errors import UserError
from opensora_jax.data.cache.cache_key import clips_digest
from opensora_jax.data.media.clip_bytes import Stills
from opensora_jax.data.media.video import VideoError, check_file
from opensora_jax.data.media.video_writer import mux_stills
from opensora_jax.data.plan.digests import column_digest, digest
from opensora_jax.data.shards.shards import CLIP, ShardReader
from opensora_jax.data.table import records
from opensora_jax.data.table.probing import file_stamp

MAX_CLIP_BYTES = (1 << 31) - (1 << 20)  # a tf.train.Example ends at 2 GiB
CHANGED = "the file has changed since it was probed"
PLACE = ["path", "shard", "record", "mtime_ns", "size_bytes", "fps"]
FACTS = {
    "text": tfds.features.Text(),
    "path": tfds.features.Text(),
    "num_frames": tfds.features.Scalar(np.int64),
    "height": tfds.features.Scalar(np.int64),
    "width": tfds.features.Scalar(np.int64),
    "fps": tfds.features.Scalar(np.float32),
    "variable_fps": tfds.features.Scalar(np.bool_),
}


class TableClips:
    """The ok rows of a table: their encoded clips, and what else a record says of them."""

    def __init__(self, table: pa.Table):
        self.table = table
        self.rows = np.flatnonzero(pc.equal(table["status"], "ok").to_numpy())
        if not len(self.rows):
            raise UserError(f"None of the {len(table)} rows is ok, so there is nothing to shard: see their `reason`.")
        self.sizes = _clip_sizes(table, self.rows)
        self.facts, self.features = _facts(table)
        self.reader = ShardReader()

    @cached_property
    def key(self) -> str:
        """A hash of all that goes into the shards."""
        names = self.facts.column_names
        columns = [self.table["status"], *(self.facts[name] for name in names if name != "path")]
        return digest(clips_digest(self.table, self.rows), "\n".join(names), *map(column_digest, columns))

    def examples(self, rows: Int[np.ndarray, " N"]) -> Iterator[tuple[int, bytes | VideoError]]:
        """Yields each row with its record, or with the reason why there is none."""
        serializer = tfds.core.ExampleSerializer(self.features.get_serialized_info())
        places = records.take_rows(self.table.select(PLACE), rows).to_pylist()
        facts = records.take_rows(self.facts, rows).to_pylist()
        for row, place, fact in zip(rows.tolist(), places, facts, strict=True):
            try:
                encoded = self.features.encode_example({CLIP: self._encoded(**place)} | fact)
                yield row, serializer.get_tf_example(encoded).SerializeToString(deterministic=True)
            except VideoError as error:
                yield row, error

    def _encoded(self, path: str, shard: str, record: int, mtime_ns: int, size_bytes: int, fps: float) -> bytes:
        """Returns the clip. Raises: VideoError if it cannot be read or is another one than when it was probed."""
        stamp = file_stamp(shard or path)
        if stamp == (0, 0):
            check_file(shard or path)
        if stamp[1] != size_bytes or (not shard and mtime_ns not in (0, stamp[0])):
            raise VideoError(CHANGED)
        if shard:
            clip = self.reader.read(shard, record)
            if isinstance(clip, Stills):
                return mux_stills(clip, fps) if len(clip) > 1 else clip[0]
            return clip
        if size_bytes > MAX_CLIP_BYTES:
            raise VideoError("larger than 2 GiB, which no record can be: cut it into clips")
        try:
            clip = Path(path).read_bytes()
        except OSError as error:
            raise VideoError(f"cannot be read: {error.strerror}") from None
        if len(clip) != size_bytes:
            raise VideoError(CHANGED)
        return clip


def _clip_sizes(table: pa.Table, rows: Int[np.ndarray, " N"]) -> Int[np.ndarray, " M"]:
    """Returns the bytes of each row's clip: on average, for one in a shard, whose row knows the shard's size alone."""
    sizes = table["size_bytes"].to_numpy().copy()
    unknown = int((sizes[rows] <= 0).sum())
    if unknown:
        raise UserError(
            f"{unknown} of the {len(rows)} ok rows have no size_bytes: run `dataset meta` on the table first."
        )
    shard = records.numbered(table["shard"]).indices.to_numpy()
    inside = pc.not_equal(table["shard"], "").to_numpy()
    sizes[inside] //= np.bincount(shard)[shard[inside]]
    return sizes


def _facts(table: pa.Table) -> tuple[pa.Table, tfds.features.FeaturesDict]:
    """Returns what records say beside the clip, without nulls, and its features; scores are among it.

    TFDS has no float64: the table keeps the exact values, and further columns that are no plain values.
    """
    columns, features = {name: table[name] for name in FACTS}, dict(FACTS)
    for name in records.further_columns(table):
        column, kind = table[name], table[name].type
        if name == CLIP or "/" in name:
            continue
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            columns[name], features[name] = pc.fill_null(column, ""), tfds.features.Text()
        elif pa.types.is_integer(kind) and not column.null_count:
            columns[name], features[name] = column.cast(pa.int64(), safe=False), tfds.features.Scalar(np.int64)
        elif pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind):
            columns[name] = pc.fill_null(column.cast(pa.float32(), safe=False), float("nan"))
            features[name] = tfds.features.Scalar(np.float32)
    clip = tfds.features.Tensor(shape=(), dtype=np.object_)
    return pa.table(columns), tfds.features.FeaturesDict({CLIP: clip} | features)
