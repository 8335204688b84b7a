"""The table of clips: one row per file with its caption and what probing found, as parquet or CSV.

The columns are those of Open-Sora's CSV files (docs/train.md there), so that its tables are read as they
are, plus `variable_fps`, `status`, `reason` and a stamp of the file; further columns (scores) are kept.
Files that cannot be used stay in the table as `bad` rows with the reason: nothing disappears unseen.
"""

import io
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from opensora_jax.config.errors import UserError
from opensora_jax.data.video import VideoError, VideoInfo, probe

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

SCHEMA = pa.schema(
    [
        ("path", pa.string()),
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
    "fps": float("nan"),
    "variable_fps": False,
    "status": "ok",
    "reason": "",
    "mtime_ns": 0,
    "size_bytes": 0,
}
REQUIRED = [name for name in SCHEMA.names if name not in FILLED or name == "fps"]


def read_table(path: str | Path) -> pa.Table:
    """Returns the table, the columns of SCHEMA first; what a foreign table lacks is filled in (status: ok).

    Raises UserError for a missing file, another format, or a table without a needed column.
    """
    path = Path(path)
    table = _read_any(path, "a table made by `python -m opensora_jax.dataset meta`")
    _require(table, REQUIRED, path)
    for name, value in FILLED.items():
        column = table[name] if name in table.column_names else pa.nulls(len(table))
        column = column.cast(pa.float64()) if name == "fps" else column
        table = _with_column(table, name, pc.fill_null(column.cast(SCHEMA.field(name).type), value))
    table = _with_column(table, "text", pc.fill_null(table["text"].cast(pa.string()), ""))
    try:
        columns = [table[field.name].cast(field.type) for field in SCHEMA]
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} has a value of the wrong type: {error}. Make it again with `dataset meta`.") from None
    extra = [name for name in table.column_names if name not in SCHEMA.names]
    table = pa.table(columns + [table[name] for name in extra], names=SCHEMA.names + extra)
    return _mark_incomplete(table)


def write_table(table: pa.Table, path: str | Path) -> None:
    """Writes `.parquet` or `.csv`, complete or not at all. Raises UserError for other suffixes."""
    path = Path(path)
    writers = {".parquet": pyarrow.parquet.write_table, ".csv": pyarrow.csv.write_csv}
    if path.suffix not in writers:
        raise UserError(f"A table is .parquet or .csv: got {path}. Choose one of these names.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        writers[path.suffix](table, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def list_videos(source: str | Path) -> list[tuple[str, str]]:
    """Returns (absolute path, caption) of every file in a table with `path,text`, or under a folder.

    Paths of a table are relative to its folder. In a folder a caption is the `.txt` file beside the video,
    else the row of the folder's captions.csv or metadata.csv, else the file's name in words. Raises UserError
    if there are no files.
    """
    source = Path(source)
    if not source.exists():
        raise UserError(f"No data at {source}: give a folder of videos, or a .csv or .parquet with path,text.")
    pairs = _list_folder(source) if source.is_dir() else _list_table(source)
    if not pairs:
        raise UserError(f"No videos in {source}: it needs files such as .mp4, or rows with path,text.")
    return pairs


def describe(path: str, text: str) -> dict[str, Any]:
    """Returns the row of one file, by probing it; a useless file gives a bad row, never an exception."""
    row: dict[str, Any] = dict.fromkeys(SCHEMA.names, 0) | {
        "path": path,
        "text": text,
        "status": "bad",
        "reason": "",
    }
    row |= {"aspect_ratio": 0.0, "fps": float("nan"), "variable_fps": False}
    try:
        path.encode("utf-8")
        row["mtime_ns"], row["size_bytes"] = file_stamp(path)
        return row | _facts(probe(path))
    except UnicodeEncodeError:
        return row | {
            "path": path.encode("utf-8", "replace").decode(),
            "reason": "the file name is not UTF-8",
        }
    except VideoError as error:
        return row | {"reason": str(error)}


def file_stamp(path: str) -> tuple[int, int]:
    """Returns what tells a changed file: (modification time in ns, size in bytes), zeros if there is none."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError):  # ValueError: a zero byte in the name
        return 0, 0
    return stat.st_mtime_ns, stat.st_size


def _facts(info: VideoInfo) -> dict[str, Any]:
    shape = {"height": info.height, "width": info.width, "num_frames": info.num_frames}
    derived = {"aspect_ratio": info.height / info.width, "resolution": info.height * info.width}
    return shape | derived | {"fps": info.fps, "variable_fps": info.variable_fps, "status": "ok"}


def _list_table(path: Path) -> list[tuple[str, str]]:
    table = _read_any(path, "a .csv or .parquet with path,text")
    _require(table, ["path", "text"], path)
    columns = (pc.fill_null(table[name].cast(pa.string()), "").to_pylist() for name in ("path", "text"))
    return [(_absolute(name, path.parent), text) for name, text in zip(*columns, strict=True)]


def _list_folder(folder: Path) -> list[tuple[str, str]]:
    known = VIDEO_SUFFIXES + IMAGE_SUFFIXES
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in known and not p.name.startswith("."))
    tables = [folder / name for name in CAPTION_FILES if (folder / name).exists()]
    captions = dict(_list_table(tables[0])) if tables else {}
    return [(os.path.abspath(p), _caption_of(p, captions)) for p in files]


def _caption_of(path: Path, captions: dict[str, str]) -> str:
    beside = path.with_suffix(".txt")
    if beside.is_file():
        return beside.read_bytes().decode("utf-8-sig", "replace").strip()
    return captions.get(os.path.abspath(path), path.stem.replace("_", " ").replace("-", " "))


def _absolute(name: str, folder: Path) -> str:
    return name if "://" in name else os.path.abspath(folder / name)


def _read_any(path: Path, wanted: str) -> pa.Table:
    if not path.is_file() or path.suffix not in (".parquet", ".csv"):
        raise UserError(f"Cannot read {path}: it must be {wanted}. Check the path.")
    try:
        return pyarrow.parquet.read_table(path) if path.suffix == ".parquet" else _read_csv(path)
    except pa.ArrowInvalid as error:
        raise UserError(f"Cannot read {path} ({str(error).splitlines()[0]}): it must be {wanted}.") from None


def _read_csv(path: Path) -> pa.Table:
    """Reads CSV with quoted line breaks; bytes that are no UTF-8 become replacement characters."""
    text = path.read_bytes().decode("utf-8-sig", "replace").encode()
    types = {name: pa.string() for name in ("path", "text", "status", "reason")}
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    return pyarrow.csv.read_csv(
        io.BytesIO(text), parse_options=parse, convert_options=pyarrow.csv.ConvertOptions(column_types=types)
    )


def _require(table: pa.Table, names: list[str], path: Path) -> None:
    missing = [name for name in names if name not in table.column_names]
    if missing:
        need = ",".join(names)
        raise UserError(f"{path} lacks {', '.join(missing)}: it needs {need}. Add them or run `dataset meta` on it.")


def _with_column(table: pa.Table, name: str, column: Any) -> pa.Table:
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, column)
    return table.append_column(name, column)


def _mark_incomplete(table: pa.Table) -> pa.Table:
    """Rows that claim to be fine without frames or size become bad ones."""
    positive = [pc.greater(pc.fill_null(table[name], 0), 0) for name in ("num_frames", "height", "width")]
    whole = pc.and_(pc.and_(positive[0], positive[1]), positive[2])
    broken = pc.and_(pc.equal(table["status"], "ok"), pc.invert(whole))
    table = _with_column(table, "reason", pc.if_else(broken, "the row lacks frames or size", table["reason"]))
    return _with_column(table, "status", pc.if_else(broken, "bad", table["status"]))
