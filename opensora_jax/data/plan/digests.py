"""Hashes of columns of a table, from Arrow's memory: without a Python object per row, and a block of rows at a time."""

import hashlib
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool

from opensora_jax.data.plan.fit import is_ok

BLOCK = 1 << 18  # rows


class Part(NamedTuple):
    """A column to hash, without the first `skip` characters of its values."""

    column: pa.Array | pa.ChunkedArray
    skip: int = 0


def clip_names(table: pa.Table) -> list[Part]:
    """Returns the columns that say which clips the rows are: their files, and of clips in shards their names there.

    Files count from the folder that all of them lie in, so that a folder of data may be moved. Bad rows do not decide
    where that is, and have no name if they lie elsewhere.
    """
    path = pc.cast(table["path"], pa.large_string())
    ok = is_ok(table["status"]) if "status" in table.column_names else np.ones(len(table), bool)
    if "shard" not in table.column_names:
        return [_from_common_folder(path, ok)]
    shard = pc.cast(table["shard"], pa.large_string())
    in_shard = pc.fill_null(pc.not_equal(shard, ""), False)
    if not pc.any(in_shard).as_py():
        return [_from_common_folder(path, ok)]
    files, names = shard, path
    if not pc.all(in_shard).as_py():
        files, names = pc.if_else(in_shard, shard, path), pc.if_else(in_shard, path, "")
    return [_from_common_folder(files, ok), Part(names)]


def column_digest(column: pa.Array | pa.ChunkedArray, skip: int = 0) -> str:
    """Returns a digest of a column's values, however it is cut into chunks."""
    sizes, values = hashlib.sha256(), hashlib.sha256()
    for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
        for start in range(0, len(chunk), BLOCK):
            block = chunk[start : start + BLOCK]
            if _is_text(block.type):
                _add_text(block, skip, sizes, values)
            else:
                _add_numbers(block, values)
    return digest(sizes.hexdigest(), values.hexdigest())


def digest(*parts: str | bytes) -> str:
    """Returns a short hash of texts and bytes."""
    hashes = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        hashes.update(len(data).to_bytes(8, "little") + data)
    return hashes.hexdigest()[:16]


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _add_text(block: pa.Array, skip: int, sizes: "hashlib._Hash", values: "hashlib._Hash") -> None:
    text = pc.fill_null(pc.cast(block, pa.large_string()), "")
    text = pc.utf8_slice_codeunits(text, skip) if skip else text
    ends = np.frombuffer(text.buffers()[1], np.int64)[text.offset : text.offset + len(text) + 1]
    sizes.update(np.diff(ends).astype("<i8").tobytes())
    values.update(memoryview(text.buffers()[2] or b"")[ends[0] : ends[-1]])


def _add_numbers(block: pa.Array, values: "hashlib._Hash") -> None:
    numbers = block.to_numpy(zero_copy_only=False)
    if np.issubdtype(numbers.dtype, np.floating):
        numbers = np.where(np.isnan(numbers), np.nan, numbers)  # one NaN of the many
    values.update(numbers.astype(numbers.dtype.newbyteorder("<")).tobytes())


def _from_common_folder(paths: pa.ChunkedArray, ok: Bool[np.ndarray, " N"]) -> Part:
    """Returns paths from the folder of the ok ones on; of the others those that lie elsewhere are null."""
    if ok.all():
        return Part(paths, len(_common_folder(paths)))
    folder = _common_folder(paths.filter(pa.array(ok)))
    named = pc.or_kleene(pa.array(ok), pc.starts_with(paths, folder))
    return Part(pc.if_else(named, paths, None), len(folder))


def _common_folder(paths: pa.ChunkedArray) -> str:
    """Returns the folder above all paths, with its slash.

    What the first and the last in order share, all share.
    """
    first, last = (value or "" for value in pc.min_max(paths).as_py().values())
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[: first.rfind("/", 0, same) + 1]
