"""The run of `dataset meta` over a list of clips: only what is new is probed, and a killed run keeps what it has.

What is found goes line by line, as JSON, into `NAME.partial` beside the table. The table is made from these lines and
from the rows of earlier runs whose files have not changed, so that memory holds columns and never millions of rows.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
from tqdm import tqdm

from opensora_jax.config.errors import UserError
from opensora_jax.config.files import lock
from opensora_jax.data.table import records
from opensora_jax.data.table.probing import Row, file_stamp
from opensora_jax.data.table.sources import KEY, VIDEO_SUFFIXES, keys

Run = Callable[[pa.Table], Iterable[list[Row]]]  # clips by KEY -> rows of SCHEMA, in any order

STAMPS = 1000  # files that a thread looks up at a time
BLOCK = 1 << 16  # bytes read at a time, from the end, in search of the last whole line
REASONS_SHOWN = 10
MOVIE_NAME = "(" + "|".join(suffix.replace(".", r"\.") for suffix in VIDEO_SUFFIXES) + ")$"


def make_table(clips: pa.Table, output: Path, run: Run, num_threads: int, *, distrusted: bool = False) -> pa.Table:
    """Writes the table of `clips` (of `sources.list_clips`, without repeats) to `output`, and returns it.

    Rows of the table that is there, and of a killed run, are kept if their file is as it was; a finished table's bad
    rows get another chance. Columns that only the earlier table has are kept with its rows. `distrusted`: all clips
    in shards are probed again. Raises UserError if no clip is usable; then nothing is written.
    """
    records.check_format(clips, output)
    with _Partial(output.with_name(f"{output.name}.partial")) as partial:
        kept = _unchanged(_earlier_rows(clips, output, partial, distrusted), num_threads)
        start = partial.size()
        _probe(clips.filter(pc.invert(pc.is_in(keys(clips), keys(kept)))), kept, run, partial)
        found = pa.concat_tables([partial.rows(start), kept], promote_options="default")
        table = records.mark_impossible(_joined(clips, found))
        usable = "ok" in table["status"].unique().to_pylist()
        if usable:
            records.write_table(table, output)
        partial.remove()
    if not usable:
        why = "; ".join(line.strip() for line in summary(table)[1:])
        raise UserError(f"None of the {len(table)} clips can be used ({why}). Give others.")
    return table


def summary(table: pa.Table, repeats: Sequence[str] = (), skipped: Sequence[str] = ()) -> list[str]:
    """Returns lines that tell what is in a table, what is wrong with how many clips, and the first of each.

    `repeats` are the clips of rows that were left out, `skipped` the files that were not taken for clips.
    """
    bad = table.filter(pc.equal(table["status"], "bad")).select(["reason", "path"])
    good = table.filter(pc.equal(table["status"], "ok")).select(["path", "text", "num_frames", "variable_fps"])
    images = good.filter(pc.equal(good["num_frames"], 1))
    movies = pc.match_substring_regex(pc.utf8_lower(images["path"]), MOVIE_NAME)
    groups = [
        *((f"bad: {reason}", bad.filter(pc.equal(bad["reason"], reason))) for reason in _by_count(bad["reason"])),
        ("left out: the clip of an earlier row again", pa.table({"path": pa.array(repeats, pa.string())})),
        ("skipped: not named as a video or an image", pa.table({"path": pa.array(skipped, pa.string())})),
        ("without a caption", good.filter(pc.equal(good["text"], ""))),
        ("with a variable frame rate", good.filter(good["variable_fps"])),
        ("named as videos but of one frame: they count as images", images.filter(movies)),
    ]
    numbers = f"{len(good)} of {len(table)} clips are usable: {len(good) - len(images)} videos, {len(images)} images"
    first = ((len(rows), what, rows["path"][0].as_py() or '""') for what, rows in groups if len(rows))
    return [numbers, *(f"  {count:6d} {what}, first {path}" for count, what, path in first)]


class _Partial:
    """The file of rows that a run has found so far; what a killed run left of a line is cut off."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.file = path.open("a+b")
        if not lock(self.file):  # the system unlocks what is killed
            self.file.close()
            raise UserError(f"Another run holds {path}: wait for it, or choose another --output.")
        self.file.truncate(self._whole_lines())

    def __enter__(self) -> "_Partial":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def size(self) -> int:
        """Returns the bytes so far, all of them written."""
        return os.fstat(self.file.fileno()).st_size

    def _whole_lines(self) -> int:
        """Returns the bytes up to the end of the last whole line, which captions can make long."""
        end = self.size()
        while end:
            start = max(0, end - BLOCK)
            self.file.seek(start)
            found = self.file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
        return 0

    def append(self, rows: list[Row]) -> None:
        """Writes rows so that a kill does not lose them."""
        self.file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
        self.file.flush()

    def rows(self, start: int) -> pa.Table:
        """Returns the rows from a byte on. Raises UserError if these are not our lines."""
        if self.size() == start:
            return records.SCHEMA.empty_table()
        parse = pyarrow.json.ParseOptions(explicit_schema=records.SCHEMA, unexpected_field_behavior="ignore")
        with self.path.open("rb") as file:
            file.seek(start)
            try:
                return pyarrow.json.read_json(file, parse_options=parse)
            except pa.ArrowInvalid:
                raise UserError(f"{self.path}, left by an earlier run, cannot be read: delete it.") from None

    def remove(self) -> None:
        """Deletes the file."""
        self.path.unlink(missing_ok=True)


def _probe(todo: pa.Table, kept: pa.Table, run: Run, partial: _Partial) -> None:
    """Appends the rows of all clips to `partial` and shows how many are fine."""
    ok = kept["status"].to_pylist().count("ok")
    with tqdm(total=len(kept) + len(todo), initial=len(kept), desc="probe", unit="clip") as bar:
        for rows in run(todo.select(KEY)):
            partial.append(rows)
            ok += [row["status"] for row in rows].count("ok")
            bar.update(len(rows))
            bar.set_postfix(ok=ok, bad=bar.n - ok, refresh=False)


def _by_count(column: pa.ChunkedArray) -> list[str]:
    """Returns the most frequent values; the rest of a long list would hide what matters."""
    return [value for value, _ in Counter(column.to_pylist()).most_common(REASONS_SHOWN)]


def _earlier_rows(clips: pa.Table, output: Path, partial: _Partial, distrusted: bool) -> pa.Table:
    """Returns what earlier runs know of these clips, with their further columns."""
    finished = _finished_rows(output) if output.exists() else records.SCHEMA.empty_table()
    rows = pa.concat_tables([finished, partial.rows(0)], promote_options="default")
    if not clips["text"].null_count:
        rows = rows.set_column(rows.column_names.index("text"), "text", pa.nulls(len(rows), pa.string()))
    known = pc.is_in(keys(rows), keys(clips))
    return rows.filter(pc.and_(known, pc.equal(rows["shard"], "")) if distrusted else known)


def _finished_rows(output: Path) -> pa.Table:
    """Returns the usable rows of an earlier run, with its further columns."""
    try:
        table = records.read_table(output)
    except UserError as error:
        raise UserError(f"--output={output} is there and cannot be continued: {error} Or choose another.") from None
    return table.filter(pc.equal(table["status"], "ok"))


def _unchanged(rows: pa.Table, num_threads: int) -> pa.Table:
    """Returns the rows whose file has kept its time and size."""
    files = records.numbered(pc.if_else(pc.equal(rows["shard"], ""), rows["path"], rows["shard"]))
    names = files.dictionary.to_pylist()
    parts = [names[first : first + STAMPS] for first in range(0, len(names), STAMPS)]
    with ThreadPoolExecutor(num_threads) as pool:
        stamps = [stamp for part in pool.map(lambda part: list(map(file_stamp, part)), parts) for stamp in part]
    now = np.array(stamps, np.int64).reshape(-1, 2)[files.indices.to_numpy()]
    then = np.stack([rows[name].to_numpy() for name in ("mtime_ns", "size_bytes")], axis=1)
    return rows.filter(pa.array((now == then).all(axis=1) & (now[:, 0] != 0)))


def _joined(clips: pa.Table, found: pa.Table) -> pa.Table:
    """Returns the rows of `clips` with what was found, the columns of SCHEMA first."""
    found = records.take_rows(found, pc.index_in(keys(clips), value_set=keys(found)))
    clips = records.with_column(clips, "text", pc.coalesce(clips["text"], found["text"], ""))
    for name in clips.column_names:
        found = records.with_column(found, name, clips[name])
    return found.select(records.SCHEMA.names + records.further_columns(found))
