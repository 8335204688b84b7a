"""What `dataset meta` can be pointed at: a folder of files, a table with `path,text`, or a TFDS set in array_record.

Listing opens no clip. A caption of a folder's file is the `.txt` beside it, else the row of the folder's captions.csv
or metadata.csv, else the file's name in words. What these tables name besides is listed too, be it there or not.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

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


class Listing(NamedTuple):
    """What a source holds.

    `clips` has a row per clip: path (absolute), shard, record, text, and the further columns of a table. `skipped` are
    the files of a folder that are named neither as clips nor as their captions.
    """

    clips: pa.Table
    skipped: list[str]


def list_clips(source: str | Path, split: str = "train") -> Listing:
    """Returns what there is. Paths of a table are relative to its folder.

    Of a TFDS set this lists one `split`, with texts null. Raises UserError if there is nothing, or no clip.
    """
    source = Path(source)
    if not source.exists():
        raise UserError(f"No data at {source}: give {WANTED}.")
    if not source.is_dir():
        found = Listing(_of_table(source), [])
    elif all((source / name).is_file() for name in TFDS_FILES):
        found = Listing(_of_tfds(source, split), [])
    else:
        found = _of_folder(source)
    if not len(found.clips):
        sets = sorted(path.parent for path in source.rglob(TFDS_FILES[0])) if source.is_dir() else []
        hint = f" There is a TFDS set in {sets[0]}: give that folder." if sets else ""
        raise UserError(f"No clips in {source}: it needs files such as .mp4 or .jpg, or rows with path,text.{hint}")
    return found


def drop_repeats(clips: pa.Table) -> tuple[pa.Table, list[str]]:
    """Returns the table without the rows whose clip stands in a row above, and the names of those."""
    codes = records.numbered(keys(clips)).indices.to_numpy()
    again = np.ones(len(clips), bool)
    again[np.unique(codes, return_index=True)[1]] = False
    return clips.filter(pa.array(~again)), clips.filter(pa.array(again))["path"].to_pylist()


def keys(clips: pa.Table) -> pa.ChunkedArray:
    """Returns a text for each row that says which clip it means."""
    parts = (clips["shard"], clips["record"].cast(pa.string()), clips["path"])
    return pc.binary_join_element_wise(*parts, "\n")


def _of_table(path: Path) -> pa.Table:
    table = records.read_any(path, "a .csv or .parquet with path,text")
    records.require(table, ["path", "text"], path, "Rename or add them.")
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


def _visible(folder: Path) -> Iterator[Path]:
    """Yields all files and folders below a folder, through links, but not what a leading dot hides.

    Raises: OSError for a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(place)
        folders[:] = [name for name in folders if real not in seen and not name.startswith(".")]
        if real not in seen:
            yield from (Path(place, name) for name in (*folders, *files) if not name.startswith("."))
        seen.add(real)


def _of_folder(folder: Path) -> Listing:
    """Returns the clips of a folder, then the other rows of its table: repeated ones, and those without such a file."""
    folder = Path(os.path.abspath(folder))
    visible = sorted(_visible(folder))
    files = [p for p in visible if p.suffix.lower() in VIDEO_SUFFIXES + IMAGE_SUFFIXES]
    tables = [folder / name for name in CAPTION_FILES if (folder / name).exists()]
    table = _of_table(tables[0]) if tables else _files([], [])
    clips = _files([_readable(str(p)) for p in files], [_caption_beside(p) for p in files])
    row = pc.index_in(keys(clips), value_set=keys(table))  # of several the first
    words = pa.array([_readable(p.stem).replace("_", " ").replace("-", " ") for p in files], pa.string())
    clips = records.with_column(clips, "text", pc.coalesce(clips["text"], records.take(table["text"], row), words))
    for name in records.further_columns(table):
        clips = clips.append_column(name, records.take(table[name], row))
    others = np.ones(len(table), bool)
    others[row.drop_null().to_numpy()] = False
    clips = pa.concat_tables([clips, table.filter(pa.array(others))])
    known = {*files, *tables, *(p.with_suffix(".txt") for p in files), *map(Path, table["path"].to_pylist())}
    return Listing(clips, [_readable(str(p)) for p in visible if p not in known and p.is_file()])


def _clips(paths: list[str], shards: list[str], numbers: list[int], texts: list[Any]) -> pa.Table:
    schema = pa.schema([records.SCHEMA.field(name) for name in (*KEY, "text")])
    return pa.table([paths, shards, numbers, texts], schema=schema)


def _files(paths: list[str], texts: list[str | None]) -> pa.Table:
    return _clips(paths, [""] * len(paths), [0] * len(paths), texts)


def _caption_beside(path: Path) -> str | None:
    beside = path.with_suffix(".txt")
    return beside.read_bytes().decode("utf-8-sig", "replace").strip() if beside.is_file() else None


def _readable(name: str) -> str:
    """Returns the name with bytes that are no UTF-8 replaced."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _absolute(name: str, folder: str) -> str:
    return name if not name or "://" in name else os.path.normpath(os.path.join(folder, name))
