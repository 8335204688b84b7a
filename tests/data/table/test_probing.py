import os

import numpy as np
import pyarrow as pa
import pytest

from opensora_jax.config.errors import UserError
from opensora_jax.data.media.video_writer import write_video
from opensora_jax.data.shards.record_files import RecordError, RecordReader
from opensora_jax.data.table import probing
from opensora_jax.data.table.probing import describe, in_processes


def clips_of(paths: list[str]) -> pa.Table:
    return pa.table({"path": paths, "shard": [""] * len(paths), "record": [0] * len(paths)})


def rows_of(clips: pa.Table, num_workers: int) -> list[dict]:
    rows = [row for rows in in_processes(clips, num_workers) for row in rows]
    return sorted(rows, key=lambda row: row["path"])


def test_a_good_file_gives_a_full_row(tmp_path):
    path = write_video(tmp_path / "clip.mp4", np.zeros((5, 34, 46, 3), np.uint8), 8)
    stat = os.stat(path)
    assert describe(str(path)) == {
        "path": str(path),
        "shard": "",
        "record": 0,
        "text": "",
        "num_frames": 5,
        "height": 34,
        "width": 46,
        "aspect_ratio": 34 / 46,
        "resolution": 34 * 46,
        "fps": 8.0,
        "variable_fps": False,
        "status": "ok",
        "reason": "",
        "mtime_ns": stat.st_mtime_ns,
        "size_bytes": stat.st_size,
    }


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/nowhere/a.mp4", "no such file"),
        ("zero\0byte.mp4", "no such file"),
        ("", "the row has no path"),
        ("/nowhere/caf\N{REPLACEMENT CHARACTER}.mp4", "the file name is not UTF-8"),
        ("/", "not a file"),
        ("https://x.org/a.mp4", "a URL, not a file: download it first"),
    ],
)
def test_a_bad_file_gives_a_row_with_the_reason(path, reason):
    row = describe(path)
    assert (row["path"], row["status"], row["reason"], row["num_frames"]) == (path, "bad", reason, 0)


def test_a_shard_that_is_gone_and_a_record_that_cannot_be_are_bad_rows(tmp_path):
    assert describe("a", str(tmp_path / "gone" / "x.array_record"), 0)["reason"] == "no such file"
    assert describe("a", str(tmp_path / ("x" * 300)), 0)["reason"] == "cannot be opened: File name too long"
    with pytest.raises(RecordError, match="record -1: records are numbered from 0"):
        RecordReader().read(tmp_path / "x.array_record", -1)


def test_processes_find_what_one_finds(tmp_path, monkeypatch):
    write_video(tmp_path / "clip.mp4", np.zeros((5, 34, 46, 3), np.uint8), 8)
    names = [f"{number}.mp4" for number in range(7)]
    for name in names[::2]:
        os.link(tmp_path / "clip.mp4", tmp_path / name)
    clips = clips_of([str(tmp_path / name) for name in names])
    alone = rows_of(clips, 1)
    assert [row["status"] for row in alone] == ["ok", "bad"] * 3 + ["ok"]
    monkeypatch.setattr(probing, "CHUNK", 2)
    np.testing.assert_equal(rows_of(clips, 2), alone)


def test_a_worker_that_is_killed_is_told_in_one_line(tmp_path, monkeypatch):
    """As where memory runs out. This ffmpeg kills the process that started it."""
    (tmp_path / "ffmpeg").write_text("#!/bin/sh\nkill -9 $PPID\n")
    (tmp_path / "ffmpeg").chmod(0o755)
    (tmp_path / "a.mp4").write_text("something")
    monkeypatch.setenv("FFMPEG_BINARY", str(tmp_path / "ffmpeg"))
    monkeypatch.setattr(probing, "CHUNK", 1)
    with pytest.raises(UserError, match=r"A worker process was killed.* --num_workers"):
        rows_of(clips_of([str(tmp_path / "a.mp4")] * 3), 2)
