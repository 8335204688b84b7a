"""The table of clips: one row per clip with its caption and what probing found, as parquet or CSV.

The columns are those of Open-Sora's CSV files (docs/train.md there), so that its tables are read as they
are, plus where the clip lies in a shard, `variable_fps`, `status`, `reason` and a stamp of the file; further
columns (scores) are kept. Clips that cannot be used stay as `bad` rows with the reason: nothing disappears unseen.
"""

import functools
import io
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from opensora_jax.config.errors import UserError
from opensora_jax.config.files import replacing

SCHEMA = pa.schema(
    [
        ("path", pa.string()),  # of a clip in a shard: its name
        ("shard", pa.string()),  # "" = a file of its own; absolute here, stored relative to the table's folder
        ("record", pa.int64()),  # its number in the shard
        ("text", pa.string()),
        ("num_frames", pa.int64()),
        ("height", pa.int64()),  # after rotation
        ("width", pa.int64()),
        ("aspect_ratio", pa.float64()),  # height / width
        ("resolution", pa.int64()),  # height * width
        ("fps", pa.float64()),  # NaN for images
        ("variable_fps", pa.bool_()),
        ("status", pa.string()),  # "ok" or "bad"
        ("reason", pa.string()),  # of a bad row, else ""
        ("mtime_ns", pa.int64()),  # of the file when it was probed; 0 = unknown, so probe again
        ("size_bytes", pa.int64()),
    ]
)
FILLED = {
    "shard": "",
    "record": 0,
    "fps": float("nan"),
    "variable_fps": False,
    "status": "ok",
    "reason": "",
    "mtime_ns": 0,
    "size_bytes": 0,
}
REQUIRED = [name for name in SCHEMA.names if name not in FILLED or name == "fps"]
SUFFIXES = (".parquet", ".csv")
NO_CAPTION = ("nan", "NaN", "NAN")  # what other tools write for nothing
SIZES = ("num_frames", "height", "width")
MOST = (10**8, 2**16, 2**16)  # of SIZES: more (48 days at 24 fps) is a mistake in the table
MOST_FPS = 1000.0  # a frame in each millisecond, which is as fine as many containers tell times
TAKEN = 2**17  # rows at a time


def read_table(path: str | Path) -> pa.Table:
    """Returns the table, the columns of SCHEMA first; what a foreign table lacks is filled in (status: ok).

    Rows with impossible numbers become bad ones. Raises UserError for a missing file, another format, or a
    table without a needed column or with words among its numbers.
    """
    path = Path(path)
    table = read_any(path, "a table made by `python -m opensora_jax.dataset meta`")
    require(table, REQUIRED, path, "Add them or run `dataset meta` on it.")
    columns = [column(table, name, path) for name in SCHEMA.names]
    extra = further_columns(table)
    table = pa.table(columns + [table[name] for name in extra], names=SCHEMA.names + extra)
    return mark_impossible(map_shards(table, lambda shard: os.path.abspath(path.parent / shard)))


def write_table(table: pa.Table, path: str | Path) -> None:
    """Writes `.parquet` or `.csv`, complete or not at all. Raises UserError as `check_format` does.

    Shards below the table's folder are stored relative to it, so that the folder can be moved.
    """
    path = Path(path)
    check_format(table, path)
    write = pyarrow.csv.write_csv if path.suffix.lower() == ".csv" else pyarrow.parquet.write_table
    path.parent.mkdir(parents=True, exist_ok=True)
    table = map_shards(table, lambda shard: _relative(shard, os.path.abspath(path.parent)))
    with replacing(path) as temporary:
        write(table, temporary)


def check_suffix(path: Path) -> None:
    """Raises UserError unless the name is one of a table."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"A table is .parquet or .csv: got {path}. Choose one of these names.")


def check_format(table: pa.Table, path: Path) -> None:
    """Raises UserError unless the name is one of a table and, for CSV, its columns hold plain values."""
    check_suffix(path)
    if path.suffix.lower() == ".csv":
        for name in table.column_names:
            try:
                pyarrow.csv.write_csv(table.select([name]).slice(0, 0), io.BytesIO())
            except pa.ArrowInvalid:
                kind = table.schema.field(name).type
                raise UserError(f"The column {name} ({kind}) cannot stand in a CSV: write a .parquet.") from None


def read_any(path: Path, wanted: str) -> pa.Table:
    """Returns a parquet or CSV file as it is. Raises UserError, with what was `wanted`, if it cannot be read."""
    if not path.is_file() or path.suffix.lower() not in SUFFIXES:
        raise UserError(f"Cannot read {path}: it must be {wanted}. Check the path.")
    try:
        table = _read_csv(path) if path.suffix.lower() == ".csv" else pyarrow.parquet.read_table(path)
    except (pa.ArrowException, OSError) as error:  # pyarrow raises OSError for damaged pages
        if isinstance(error, OSError) and error.errno:
            raise
        raise UserError(f"Cannot read {path} ({str(error).splitlines()[0]}): it must be {wanted}.") from None
    twice = sorted(name for name, count in Counter(table.column_names).items() if count > 1)
    if twice:
        raise UserError(f"{path} has several columns named {', '.join(twice)}: rename or remove all but one.")
    return table


def require(table: pa.Table, names: list[str], path: Path, advice: str) -> None:
    """Raises UserError, with an advice, if columns are missing."""
    missing = [name for name in names if name not in table.column_names]
    if missing:
        had = f"it has {', '.join(table.column_names)[:200]} and needs {','.join(names)}"
        raise UserError(f"{path} lacks {', '.join(missing)}: {had}. {advice}")


def column(table: pa.Table, name: str, path: Path) -> Any:
    """Returns a column of SCHEMA out of any table: of its type, without nulls. Raises UserError if it cannot be."""
    field = SCHEMA.field(name)
    if name not in table.column_names:
        return pa.repeat(pa.scalar(FILLED[name], field.type), len(table))
    if name == "text":
        return _captions(table[name], path)
    nothing = FILLED.get(name, "" if pa.types.is_string(field.type) else 0)
    return pc.fill_null(_cast(table[name], field, path), nothing)


def take(column: pa.ChunkedArray, rows: Any) -> pa.ChunkedArray:
    """Returns the values at these rows, null for null; Arrow's own `take` fails where texts together exceed 2 GiB."""
    wide = _wide(column)
    parts = [wide.take(rows[i : i + TAKEN]).cast(column.type) for i in range(0, len(rows), TAKEN)]
    return pa.chunked_array([chunk for part in parts for chunk in part.chunks], column.type)


def take_rows(table: pa.Table, rows: Any) -> pa.Table:
    """Returns a table with `take` of every column."""
    return pa.table({name: take(table[name], rows) for name in table.column_names})


def numbered(column: pa.ChunkedArray) -> pa.DictionaryArray:
    """Returns the column's distinct values, in the order they first come in, and the number of each row's."""
    return _wide(column).combine_chunks().dictionary_encode()


def _wide(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns texts with offsets of 64 bits, and any other column as it is."""
    return column.cast(pa.large_string()) if pa.types.is_string(column.type) else column


def further_columns(table: pa.Table) -> list[str]:
    """Returns the names of the columns that SCHEMA does not have, such as scores."""
    return [name for name in table.column_names if name not in SCHEMA.names]


def with_column(table: pa.Table, name: str, column: Any) -> pa.Table:
    """Returns the table with this column in the place of that name, or at its end."""
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, column)
    return table.append_column(name, column)


def map_shards(table: pa.Table, change: Callable[[str], str]) -> pa.Table:
    """Returns the table with every shard's name changed, each distinct one once; "" stays."""
    if "shard" not in table.column_names:
        return table
    encoded = numbered(table["shard"])
    names = [change(name) if name else name for name in encoded.dictionary.to_pylist()]
    return with_column(table, "shard", take(pa.chunked_array([pa.array(names, pa.string())]), encoded.indices))


def _relative(shard: str, folder: str) -> str:
    return os.path.relpath(shard, folder) if shard.startswith(folder + os.sep) else shard


def _read_csv(path: Path) -> pa.Table:
    """Reads CSV with quoted line breaks; bytes that are no UTF-8 become replacement characters."""
    text = path.read_bytes().decode("utf-8-sig", "replace").encode()
    types = {field.name: pa.string() for field in SCHEMA if pa.types.is_string(field.type)}
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    return pyarrow.csv.read_csv(
        io.BytesIO(text), parse_options=parse, convert_options=pyarrow.csv.ConvertOptions(column_types=types)
    )


def _captions(column: pa.ChunkedArray, path: Path) -> pa.ChunkedArray:
    """Returns a column as captions: "" for nothing and for the NaN of other tools; broken UTF-8 is replaced."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        values = (value and value.decode("utf-8", "replace") for value in column.to_pylist())
        column = pa.chunked_array([pa.array(values, pa.string())])
    text = _cast(column, pa.field("text", pa.string()), path)
    return pc.if_else(pc.is_in(text, pa.array([None, *NO_CAPTION])), "", text)


def _cast(column: pa.ChunkedArray, field: pa.Field, path: Path) -> pa.ChunkedArray:
    try:
        if pa.types.is_floating(column.type) and pa.types.is_integer(field.type):
            possible = pc.less(pc.abs(column), 2.0**62)  # not NaN, not infinite
            column = pc.if_else(possible, column, pa.scalar(None, column.type))
        if pa.types.is_string(column.type) and not pa.types.is_string(field.type):
            column = pc.if_else(pc.equal(column, ""), pa.scalar(None, column.type), column)
        return column.cast(field.type)
    except pa.ArrowException as error:
        wrong = f"{path} has a value of the wrong type in {field.name}: {str(error).splitlines()[0]}"
        raise UserError(f"{wrong}. Mend it, or make the table again with `dataset meta`.") from None


def mark_impossible(table: pa.Table) -> pa.Table:
    """Returns the table with rows that claim to be fine with numbers that no clip has as bad ones."""
    sizes, fps = [table[name] for name in SIZES], table["fps"]
    image = pc.and_(pc.is_nan(fps), pc.equal(table["num_frames"], 1))
    for fine, reason, names in (
        (_all([pc.greater(size, 0) for size in sizes]), "the row lacks frames or size", SIZES),
        (_all([pc.less_equal(*pair) for pair in zip(sizes, MOST, strict=True)]), "more than a clip can have", SIZES),
        (pc.or_(image, pc.and_(pc.is_finite(fps), pc.greater(fps, 0))), "no frame rate", ("fps",)),
        (pc.or_(image, pc.less_equal(fps, MOST_FPS)), "more than a clip can have", ("fps",)),
    ):
        wrong = pc.and_(pc.equal(table["status"], "ok"), pc.invert(fine))
        if not pc.any(wrong).as_py():
            continue
        claims = [pc.binary_join_element_wise(name, table[name].cast(pa.string()), " ") for name in names]
        told = pc.binary_join_element_wise(f"{reason}:", *claims, " ")
        table = with_column(table, "reason", pc.if_else(wrong, told, table["reason"]))
        table = with_column(table, "status", pc.if_else(wrong, "bad", table["status"]))
    return table


def _all(masks: list[Any]) -> Any:
    return functools.reduce(pc.and_, masks)
