"""Copies the clips of a table, encoded as they are, with captions and facts into shards of a TFDS data set.

Records keep the order of the table: reads are random, to which order is nothing; files are copied as they lie on the
disk; and rows keep their numbers, so that a plan over the shards is the one over the files. Memory holds one clip for
each shard under way.
"""

import re
import shutil
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int
from tqdm import tqdm

from opensora_jax.config.errors import UserError
from opensora_jax.data.media.video import VideoError
from opensora_jax.data.plan.digests import digest
from opensora_jax.data.shards.record_files import RecordWriter
from opensora_jax.data.shards.shard_examples import TableClips
from opensora_jax.data.shards.tfds_folder import TfdsFolder
from opensora_jax.data.table import records
from opensora_jax.data.table.probing import file_stamp

MAX_LOST_RATE = 0.1  # of all clips
FEW_LOST = 10  # say nothing


@dataclass(frozen=True)
class Summary:
    """What a folder holds, how many shards were written now, and why clips were left out: (reason, number)."""

    clips: int
    shards: int
    new_shards: int
    left_out: list[tuple[str, int]]


def write_shards(table: pa.Table, folder: Path, *, name: str, shard_bytes: int, num_workers: int) -> Summary:
    """Writes the ok rows of a table (of `records.read_table`) as a data set; a later run continues a killed one.

    Beside the files of TFDS the folder gets `meta.parquet`: the table with `shard` and `record`, in which clips that
    changed since they were probed, or cannot be read, are bad rows. Shards hold some `shard_bytes` of clips; what each
    of them holds depends on the table alone. Raises: UserError if there is no clip to copy, or the folder has other
    contents.
    """
    if not re.fullmatch(r"[a-zA-Z]\w*", name, re.ASCII):
        raise UserError(f"--name={name} cannot name a data set: use letters, digits and _, a letter first.")
    clips = TableClips(table)
    parts = np.split(clips.rows, boundaries(clips.sizes[clips.rows], shard_bytes))
    output = TfdsFolder(folder, name, digest(clips.key, name, str(shard_bytes)), len(parts))
    output.claim()
    with output.writing():
        return _write(table, clips, parts, output, num_workers)


def _write(
    table: pa.Table, clips: TableClips, parts: list[Int[np.ndarray, " _"]], output: TfdsFolder, num_workers: int
) -> Summary:
    missing = _missing(output)
    if missing:
        output.reopen()
        _Copy(clips, parts, output).run(missing, num_workers)
    left_out = _left_out(output)
    kept = [part[~np.isin(part, list(left_out))] for part in parts]
    summary = Summary(sum(map(len, kept)), len(parts), len(missing), Counter(left_out.values()).most_common())
    if not summary.clips:
        shutil.rmtree(output.folder)
        reason = summary.left_out[0][0]
        raise UserError(f"None of the {len(clips.rows)} clips is as it was ({reason}): is the disk mounted?")
    table_file = output.folder / "meta.parquet"
    if not output.is_complete() or not table_file.is_file():
        records.write_table(_placed(table, kept, left_out, output), table_file)
        output.complete(clips.features, list(map(len, kept)))
    return summary


def boundaries(sizes: Int[np.ndarray, " N"], shard_bytes: int) -> Int[np.ndarray, " K"]:
    """Returns where to cut: shards begin with the first clip past each multiple of shard_bytes."""
    shard = (np.cumsum(sizes) - sizes) // shard_bytes
    return np.flatnonzero(np.diff(shard)) + 1


class _Copy:
    """Writes shards in threads, each its own; after an error all stop at their next clip."""

    def __init__(self, clips: TableClips, parts: list[Int[np.ndarray, " _"]], output: TfdsFolder):
        self.clips, self.parts, self.output = clips, parts, output
        self.stopped = threading.Event()
        self.read = self.lost = 0

    def run(self, shards: list[int], num_workers: int) -> None:
        """Writes these shards."""
        sizes = [int(self.clips.sizes[part].sum()) for part in self.parts]
        todo = sum(sizes[shard] for shard in shards)
        with (
            tqdm(total=sum(sizes), initial=sum(sizes) - todo, desc="shard", unit="B", unit_scale=True) as bar,
            ThreadPoolExecutor(num_workers) as pool,
        ):
            try:
                for _ in pool.map(lambda shard: self._write(shard, bar), shards):
                    pass
            finally:
                self.stopped.set()
                pool.shutdown(cancel_futures=True)

    def _write(self, shard: int, bar: tqdm) -> None:
        writer, left_out = RecordWriter(self.output.path(shard)), {}
        try:
            for row, example in self.clips.examples(self.parts[shard]):
                if self.stopped.is_set():
                    return
                if isinstance(example, bytes):
                    writer.write(example)
                else:
                    left_out[row] = str(example)
                with bar.get_lock():
                    bar.update(int(self.clips.sizes[row]))
                    self._count(example)
            writer.close()
            self.output.note(shard, left_out=left_out)
        except BaseException:
            self.stopped.set()
            raise
        finally:
            writer.give_up()

    def _count(self, example: bytes | VideoError) -> None:
        """Raises UserError if too many clips are lost: so it is when a disk goes away."""
        self.read += 1
        if isinstance(example, VideoError):
            self.lost += 1
            if self.lost > max(MAX_LOST_RATE * len(self.clips.rows), FEW_LOST):
                lost = f"{self.lost} of {self.read} clips are not as they were, the last because of: {example}"
                raise UserError(f"{lost}. If a disk is back now, run the same command; else run `dataset meta` again.")


def _missing(output: TfdsFolder) -> list[int]:
    """Returns the shards to write. Until the set is complete, those that lack clips have another chance."""
    notes = [output.noted(shard) for shard in range(output.shards)]
    retry = not output.is_complete()
    return [shard for shard, note in enumerate(notes) if note is None or (retry and note["left_out"])]


def _left_out(output: TfdsFolder) -> dict[int, str]:
    """Returns row -> reason of the clips that are in no shard."""
    notes = [output.noted(shard) for shard in range(output.shards)]
    return {int(row): reason for note in notes if note for row, reason in note["left_out"].items()}


def _placed(
    table: pa.Table, kept: list[Int[np.ndarray, " _"]], left_out: dict[int, str], output: TfdsFolder
) -> pa.Table:
    """Returns the table with the places of the clips in shards, and bad rows for those that are in none."""
    paths = [output.path(shard) for shard in range(output.shards)]
    stamps = np.array([file_stamp(str(path)) for path in paths], np.int64)
    shard, record = np.full(len(table), -1), table["record"].to_numpy().copy()
    for number, rows in enumerate(kept):
        shard[rows], record[rows] = number, np.arange(len(rows))
    placed = shard >= 0
    new = {
        "shard": records.take(pa.chunked_array([[path.name for path in paths]]), np.maximum(shard, 0)),
        "record": pa.array(record),
        "mtime_ns": pa.array(stamps[shard, 0]),
        "size_bytes": pa.array(stamps[shard, 1]),
    }
    for name, column in new.items():
        table = records.with_column(table, name, pc.if_else(pa.array(placed), column, table[name]))
    lost = np.zeros(len(table), bool)
    lost[list(left_out)] = True
    reasons = pa.array([left_out[row] for row in sorted(left_out)], pa.string())
    reason = pc.replace_with_mask(table["reason"], pa.array(lost), reasons)
    return records.with_column(
        records.with_column(table, "reason", reason), "status", pc.if_else(pa.array(lost), "bad", table["status"])
    )
