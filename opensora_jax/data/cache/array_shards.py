"""Arrays in numbered files of a bounded size: made in any order, by several processes, and continued after a crash.

A shard is an ArrayRecord of safetensors blobs, `latents-00003-of-00012.array_record`, and its index beside it, a
parquet with a row for every record. The index is written last and knows the size of the records: a shard without one,
or whose records have another size, is not finished.
"""

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import safetensors.numpy

from opensora_jax.config.files import replacing
from opensora_jax.data.shards.record_files import RecordReader, RecordWriter

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
STORED = {"F32": DTYPES["float32"], "BF16": DTYPES["bfloat16"]}  # safetensors' own names
INDEX_THREADS = 16  # a network file system answers many questions at once
ABOUT = b"shard"  # the key in the parquet's metadata


@dataclass(frozen=True)
class ShardInfo:
    """What the index of a finished shard says of it: its records, their file's bytes, and notes of the writer."""

    records: int
    size_bytes: int
    notes: dict[str, Any]


@dataclass(frozen=True)
class ArrayShards:
    """The shards of `items` things in a folder, `shard_size` to each; fewer may come of them."""

    folder: Path
    name: str
    items: int
    shard_size: int
    dtype: str

    def __len__(self) -> int:
        """Returns the number of shards."""
        return -(-self.items // self.shard_size)

    def part(self, shard: int) -> slice:
        """Returns which of the items belong to a shard."""
        return slice(shard * self.shard_size, min((shard + 1) * self.shard_size, self.items))

    def records_path(self, shard: int) -> Path:
        """Returns the file of a shard's records."""
        return self.folder / f"{self.name}-{shard:05d}-of-{len(self):05d}.array_record"

    def index_path(self, shard: int) -> Path:
        """Returns the file of a shard's index."""
        return self.records_path(shard).with_suffix(".parquet")

    def info(self) -> list[ShardInfo | None]:
        """Returns what is known of every shard, None for those that are not finished."""
        return self._of_all(self._info, range(len(self)))

    def index(self, columns: list[str] | None = None) -> pa.Table:
        """Returns the indexes of all shards, which are finished, one after the other."""
        return pa.concat_tables(self._of_all(lambda shard: self._read_index(shard, columns), range(len(self))))

    @contextmanager
    def writing(self, shard: int, schema: pa.Schema) -> Iterator["ShardWriter"]:
        """Gives what adds to a shard. It is finished when the block ends, and dropped when it raises."""
        records = RecordWriter(self.records_path(shard))
        writer = ShardWriter(records, schema, DTYPES[self.dtype])
        try:
            yield writer
            writer.write_index(self.index_path(shard), records.close())
        finally:
            records.give_up()

    def reopen(self, shard: int) -> None:
        """Makes a shard unfinished."""
        self.index_path(shard).unlink(missing_ok=True)

    def _info(self, shard: int) -> ShardInfo | None:
        try:
            found = json.loads(pq.read_metadata(self.index_path(shard)).metadata[ABOUT])
            size = self.records_path(shard).stat().st_size
        except (FileNotFoundError, NotADirectoryError, pa.ArrowInvalid, KeyError):
            return None
        return ShardInfo(**found) if found["size_bytes"] == size else None

    def _read_index(self, shard: int, columns: list[str] | None) -> pa.Table:
        with pq.ParquetFile(self.index_path(shard)) as file:  # not read_table, to which "a=1" in a path is a column
            return file.read(columns).replace_schema_metadata()

    def _of_all(self, function: Any, shards: range) -> list[Any]:
        with ThreadPoolExecutor(INDEX_THREADS) as pool:
            return list(pool.map(function, shards))


class ShardWriter:
    """Adds records with their rows to a shard; `notes`, which JSON can hold, are kept in its index."""

    def __init__(self, records: RecordWriter, schema: pa.Schema, dtype: np.dtype):
        self.notes: dict[str, Any] = {}
        self._records, self._schema, self._dtype = records, schema, dtype
        self._rows: list[Mapping[str, Any]] = []

    def add(self, row: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Adds arrays, in the dtype of the shards, and what they are."""
        self._records.write(pack(arrays, self._dtype))
        self._rows.append(row)

    def write_index(self, path: Path, size_bytes: int) -> None:
        """Writes the rows beside the records, which are whole."""
        about = {"records": len(self._rows), "size_bytes": size_bytes, "notes": self.notes}
        schema = self._schema.with_metadata({ABOUT: json.dumps(about, ensure_ascii=False).encode()})
        with replacing(path) as temporary:
            pq.write_table(pa.Table.from_pylist(self._rows, schema), temporary)


class ArrayReader:
    """The records of shards that are all finished, from any thread; they are counted through all shards."""

    def __init__(self, shards: ArrayShards, info: list[ShardInfo]):
        self._shards = shards
        self._ends = np.cumsum([one.records for one in info], dtype=np.int64)
        self._files = RecordReader()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, number: int) -> dict[str, np.ndarray]:
        """Returns the arrays of a record. Raises: RecordError when they cannot be read."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        start = int(self._ends[shard - 1]) if shard else 0
        return unpack(self._files.read(self._shards.records_path(shard), number - start))


def pack(arrays: Mapping[str, np.ndarray], dtype: np.dtype) -> bytes:
    """Returns arrays as a safetensors blob of one dtype."""
    return safetensors.numpy.save({name: np.ascontiguousarray(array, dtype) for name, array in arrays.items()})


def unpack(blob: bytes) -> dict[str, np.ndarray]:
    """Returns the arrays of a blob; safetensors' own reader for NumPy does not know bfloat16."""
    return {
        name: np.frombuffer(entry["data"], STORED[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in safetensors.deserialize(blob)
    }
