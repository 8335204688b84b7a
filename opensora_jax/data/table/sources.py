"""What `dataset meta` can be pointed at: a folder of files, a table with `path,text`, or a TFDS set in array_record.

Listing opens no clip. A caption of a folder's file is the `.txt` beside it, else the row of the folder's captions.csv
or metadata.csv, else the file's name in words.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from opensora_jax.config.errors import UserError
from opensora_jax.data.shards.shards import list_records
from opensora_jax.data.table import records

VIDEO_SUFFIXES = (
    ".mp4",
    ".avi",
    ".mov",
    ".mkv",
    ".webm",
    ".m4v",
    ".mpg",
    ".mpeg",
    ".wmv",
    ".flv",
    ".ts",
    ".gif",
)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
CAPTION_FILES = ("captions.csv", "metadata.csv")
TFDS_FILES = ("dataset_info.json", "features.json")
WANTED = "a folder of clips, a .csv or .parquet with path,text, or a folder of TFDS"
KEY = ("path", "shard", "record")  # which clip a row means


def list_clips(source: str | Path, split: str = "train") -> pa.Table:
    """Returns a row per clip: path (absolute), shard, record, text, and the further columns of a table.

    Paths of a table are relative to its folder. Of a TFDS set this lists one `split`, with texts null. Raises
    UserError if there is nothing, or no clip.
    """
    source = Path(source)
    if not source.exists():
        raise UserError(f"No data at {source}: give {WANTED}.")
    if not source.is_dir():
        clips = _of_table(source)
    elif all((source / name).is_file() for name in TFDS_FILES):
        clips = _of_tfds(source, split)
    else:
        clips = _of_folder(source)
    if not len(clips):
        sets = sorted(path.parent for path in source.rglob(TFDS_FILES[0])) if source.is_dir() else []
        hint = f" There is a TFDS set in {sets[0]}: give that folder." if sets else ""
        raise UserError(f"No clips in {source}: it needs files such as .mp4 or .jpg, or rows with path,text.{hint}")
    return clips


def drop_repeats(clips: pa.Table) -> tuple[pa.Table, list[str]]:
    """Returns the table without the rows whose clip stands in a row above, and the names of those."""
    codes = keys(clips).combine_chunks().dictionary_encode().indices.to_numpy()  # numbered as they first come
    again = np.ones(len(clips), bool)
    again[np.unique(codes, return_index=True)[1]] = False
    return clips.filter(pa.array(~again)), clips.filter(pa.array(again))["path"].to_pylist()


def keys(clips: pa.Table) -> pa.ChunkedArray:
    """Returns a text for each row that says which clip it means."""
    parts = (clips["shard"], clips["record"].cast(pa.string()), clips["path"])
    return pc.binary_join_element_wise(*parts, "\n")


def _of_table(path: Path) -> pa.Table:
    table = records.read_any(path, "a .csv or .parquet with path,text")
    records.require(table, ["path", "text"], path)
    extra = table.select(records.further_columns(table))
    named = {name: records.column(table, name, path) for name in (*KEY, "text")}
    in_shard = pc.not_equal(named["shard"], "").to_pylist()
    pairs = zip(named["path"].to_pylist(), in_shard, strict=True)
    folder = os.path.abspath(path.parent)
    named["path"] = pa.array([name if inside else _absolute(name, folder) for name, inside in pairs], pa.string())
    clips = records.map_shards(pa.table(named), lambda shard: _absolute(shard, folder))
    return pa.table([*clips.columns, *extra.columns], names=[*clips.column_names, *extra.column_names])


def _of_tfds(folder: Path, split: str) -> pa.Table:
    """Returns the records of a split with a null for each text: probing, which reads the record, brings it."""
    found = list_records(folder, split)
    names, shards = [record.name for record in found], [record.shard for record in found]
    return _clips(names, shards, [record.record for record in found], [None] * len(found))


def _of_folder(folder: Path) -> pa.Table:
    known = VIDEO_SUFFIXES + IMAGE_SUFFIXES
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in known and not p.name.startswith("."))
    tables = [folder / name for name in CAPTION_FILES if (folder / name).exists()]
    table = _of_table(tables[0]) if tables else _files([], [])
    captions = dict(zip(table["path"].to_pylist(), table["text"].to_pylist(), strict=True))
    return _files([_readable(os.path.abspath(p)) for p in files], [_caption_of(p, captions) for p in files])


def _clips(paths: list[str], shards: list[str], numbers: list[int], texts: list[Any]) -> pa.Table:
    schema = pa.schema([records.SCHEMA.field(name) for name in (*KEY, "text")])
    return pa.table([paths, shards, numbers, texts], schema=schema)


def _files(paths: list[str], texts: list[str]) -> pa.Table:
    return _clips(paths, [""] * len(paths), [0] * len(paths), texts)


def _caption_of(path: Path, captions: dict[str, str]) -> str:
    beside = path.with_suffix(".txt")
    if beside.is_file():
        return beside.read_bytes().decode("utf-8-sig", "replace").strip()
    return captions.get(os.path.abspath(path), _readable(path.stem).replace("_", " ").replace("-", " "))


def _readable(name: str) -> str:
    """Returns the name with bytes that are no UTF-8 replaced."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _absolute(name: str, folder: str) -> str:
    return name if not name or "://" in name else os.path.normpath(os.path.join(folder, name))
