"""Sharding: what is read back, and what a killed run, a full disk, lost files and mistakes leave."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tensorflow_datasets as tfds

from opensora_jax import dataset
from opensora_jax.config.errors import UserError
from opensora_jax.config.files import only_one
from opensora_jax.data.plan.buckets import Buckets
from opensora_jax.data.plan.plan import Plan
from opensora_jax.data.shards import shard_writer
from opensora_jax.data.shards.record_files import RecordWriter
from opensora_jax.data.shards.shard_examples import FACTS
from opensora_jax.data.shards.shard_writer import boundaries, write_shards
from opensora_jax.data.shards.shards import ShardReader
from opensora_jax.data.table import records
from opensora_jax.data.table.probing import file_stamp

ROOT = Path(__file__).parents[3]
SHARD_BYTES = 4200  # two or three clips


def content(number: int) -> bytes:
    return np.random.default_rng(number).bytes(1500 + 37 * number)


def row_of(path: Path, number: int) -> dict:
    mtime_ns, size_bytes = file_stamp(str(path))
    facts = {"num_frames": 5 + number, "height": 34, "width": 46, "aspect_ratio": 34 / 46, "resolution": 34 * 46}
    state = {"fps": 7.5, "variable_fps": number == 3, "status": "ok", "reason": ""}
    row = {"path": str(path), "shard": "", "record": 0, "text": f"clip {number}, été 雨"}
    return row | facts | state | {"mtime_ns": mtime_ns, "size_bytes": size_bytes, "score": number / 7, "source": "web"}


@pytest.fixture
def meta(tmp_path) -> Path:
    """A table of 13 files with any bytes, since sharding opens no video; row 4 is bad, row 7 an image."""
    folder = tmp_path / "files"
    folder.mkdir()
    rows = []
    for number in range(13):
        path = folder / f"{number:02d}.mp4"
        path.write_bytes(content(number))
        rows.append(row_of(path, number))
    rows[4] |= {"status": "bad", "reason": "the file is empty"}
    rows[7] |= {"num_frames": 1, "fps": float("nan"), "score": None, "source": None}
    records.write_table(pa.Table.from_pylist(rows), tmp_path / "meta.parquet")
    return tmp_path / "meta.parquet"


def make(meta: Path, output: Path, **settings):
    given = {"name": "clips", "shard_bytes": SHARD_BYTES, "num_workers": 2} | settings
    return write_shards(records.read_table(meta), output, **given)


def rows_of(output: Path) -> list[dict]:
    return records.read_table(output / "meta.parquet").to_pylist()


def shards_of(output: Path) -> list[Path]:
    return sorted(output.glob("clips-train.array_record-*"))


def check_clips(output: Path, numbers: list[int]) -> None:
    """Exactly these rows are clips, each with the bytes of its file."""
    reader, rows = ShardReader(), rows_of(output)
    assert [number for number, row in enumerate(rows) if row["status"] == "ok"] == numbers
    for number in numbers:
        assert reader.read(rows[number]["shard"], rows[number]["record"]) == content(number)


GOOD = [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12]


def test_rows_keep_their_numbers_and_read_the_bytes_of_their_files(meta, tmp_path):
    done = make(meta, tmp_path / "out")
    assert (done.clips, done.shards, done.new_shards, done.left_out) == (12, 5, 5, [])
    before, after = records.read_table(meta).to_pylist(), rows_of(tmp_path / "out")
    for old, new in zip(before, after, strict=True):
        moved = ("shard", "record", "mtime_ns", "size_bytes")
        assert repr({k: v for k, v in old.items() if k not in moved or old["status"] == "bad"}) == repr(
            {k: v for k, v in new.items() if k not in moved or old["status"] == "bad"}
        )
    check_clips(tmp_path / "out", GOOD)
    places = [(row["shard"], row["record"]) for row in after if row["status"] == "ok"]
    assert places == sorted(places)
    assert {shard for shard, _ in places} == {str(path) for path in shards_of(tmp_path / "out")}


def test_a_plan_over_shards_is_the_one_over_the_files(meta, tmp_path):
    make(meta, tmp_path / "out")
    buckets = Buckets({"32px": {5: (1.0, 3)}}, spatial_unit=8, fps_max=24)
    tables = [records.read_table(path) for path in (meta, tmp_path / "out" / "meta.parquet")]
    files, shards = (Plan(table, buckets, seed=3, data_shards=1, small_buckets="drop") for table in tables)
    for step in range(7):
        for one, other in zip(files[step], shards[step], strict=True):
            assert np.all(one == other)


def test_tfds_reads_the_shards_without_tensorflow(meta, tmp_path):
    folder = tmp_path / "sets" / "clips" / "1.0.0"  # where `tfds.data_source` looks
    make(meta, folder)
    by_name = tfds.data_source("clips", split="train", data_dir=folder.parents[1])
    by_folder = tfds.builder_from_directory(folder).as_data_source(split="train")
    good = [(number, row) for number, row in enumerate(rows_of(folder)) if row["status"] == "ok"]
    for one, other, (number, row) in zip(by_name, by_folder, good, strict=True):
        assert one["video"] == other["video"] == content(number)
        assert (one["text"].decode(), one["path"].decode()) == (row["text"], row["path"])
        assert [one[name] for name in ("num_frames", "height", "width")] == [row["num_frames"], 34, 46]
        assert one["variable_fps"] == (number == 3)
        np.testing.assert_equal(one["fps"], np.float32("nan" if number == 7 else 7.5))
        np.testing.assert_equal(one["score"], np.float32("nan" if number == 7 else number / 7))
        assert one["source"] == (b"" if number == 7 else b"web")
    assert "tensorflow" not in sys.modules


def test_shards_are_cut_where_the_bytes_before_pass_a_multiple():
    sizes = np.array([3, 3, 3, 3, 20, 1, 2])  # clips begin at 0, 3, 6, 9, 12, 32, 33
    assert boundaries(sizes, 10).tolist() == [4, 5]
    assert boundaries(sizes, 7).tolist() == [3, 5]
    assert boundaries(sizes, 1).tolist() == [1, 2, 3, 4, 5, 6]
    assert boundaries(sizes, 1000).tolist() == []


def test_the_same_table_gives_the_same_shards_for_any_number_of_workers(meta, tmp_path):
    make(meta, tmp_path / "one", num_workers=1)
    make(meta, tmp_path / "five", num_workers=5)
    one, five = (shards_of(tmp_path / name) for name in ("one", "five"))
    assert [path.name for path in one] == [path.name for path in five]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in five]


def test_files_that_are_lost_or_changed_are_bad_rows_and_shift_no_record(meta, tmp_path):
    files = tmp_path / "files"
    (files / "00.mp4").unlink()
    (files / "05.mp4").write_bytes(content(5)[::-1])  # its size as before, its time not
    os.utime(files / "05.mp4", ns=(1, 1))
    (files / "09.mp4").write_bytes(b"shorter")
    (files / "11.mp4").unlink()
    done = make(meta, tmp_path / "out")
    changed = "the file has changed since it was probed"
    assert (done.clips, done.left_out) == (8, [("no such file", 2), (changed, 2)])
    check_clips(tmp_path / "out", [1, 2, 3, 6, 7, 8, 10, 12])
    reasons = {number: row["reason"] for number, row in enumerate(rows_of(tmp_path / "out")) if row["reason"]}
    assert reasons == {0: "no such file", 4: "the file is empty", 5: changed, 9: changed, 11: "no such file"}
    assert make(meta, tmp_path / "out").left_out == done.left_out


def test_a_shard_whose_files_are_all_lost_is_empty(meta, tmp_path):
    for number in (0, 1, 2, 3):
        (tmp_path / "files" / f"{number:02d}.mp4").unlink()
    make(meta, tmp_path / "out")
    check_clips(tmp_path / "out", GOOD[4:])
    builder = tfds.builder_from_directory(str(tmp_path / "out"))
    assert builder.info.splits["train"].shard_lengths[0] == 0
    assert [one["video"] for one in builder.as_data_source(split="train")] == [content(n) for n in GOOD[4:]]


def test_where_all_files_of_a_small_table_are_lost_nothing_is_written(meta, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "FEW_LOST", 12)  # so that the 13th would be one too many
    (tmp_path / "files").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"None of the 12 clips is as it was \(no such file\)"):
        make(meta, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "elsewhere").rename(tmp_path / "files")
    assert make(meta, tmp_path / "out").clips == 12


def test_two_runs_do_not_write_one_folder(meta, tmp_path):
    make(meta, tmp_path / "out")
    with only_one(tmp_path / "out" / "notes" / "lock"), pytest.raises(UserError, match=r"Another run holds .*lock"):
        make(meta, tmp_path / "out")


def test_a_lost_table_of_a_finished_folder_is_written_again(meta, tmp_path):
    make(meta, tmp_path / "out")
    before = (tmp_path / "out" / "meta.parquet").read_bytes()
    (tmp_path / "out" / "meta.parquet").unlink()
    assert make(meta, tmp_path / "out").new_shards == 0
    assert (tmp_path / "out" / "meta.parquet").read_bytes() == before


def test_a_disk_that_goes_away_ends_the_run_and_the_next_one_has_all_clips(meta, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "FEW_LOST", 2)  # so that the third lost clip is too many
    (tmp_path / "files").rename(tmp_path / "elsewhere")
    (tmp_path / "files").mkdir()
    for number in (0, 2, 3, 5):
        (tmp_path / "elsewhere" / f"{number:02d}.mp4").rename(tmp_path / "files" / f"{number:02d}.mp4")
    with pytest.raises(UserError, match=r"3 of 7 clips are not as they were, .*no such file"):
        make(meta, tmp_path / "out", num_workers=1)
    for path in (tmp_path / "elsewhere").iterdir():
        path.rename(tmp_path / "files" / path.name)
    assert make(meta, tmp_path / "out").left_out == []
    check_clips(tmp_path / "out", GOOD)


def test_further_columns_go_into_the_records_if_they_are_plain_values(meta, tmp_path):
    table, rows = records.read_table(meta), range(13)
    further = {
        "views": pa.array([3**30 + n for n in rows]),
        "likes": pa.array([None if n == 2 else n for n in rows]),
        "safe": pa.array([n % 2 == 0 for n in rows]),
        "note": pa.array([None if n == 2 else f"été {n}" for n in rows], pa.large_string()),
        "tags": pa.array([["a"] for _ in rows]),
        "a/b": pa.array(list(rows)),
        "video": pa.array([f"id{n}" for n in rows]),
    }
    for name, column in further.items():
        table = table.append_column(name, column)
    records.write_table(table, meta)
    make(meta, tmp_path / "out")
    one = tfds.builder_from_directory(tmp_path / "out").as_data_source(split="train")[2]
    assert set(one) == {"video", *FACTS, "score", "source", "views", "likes", "safe", "note"}
    assert one["video"] == content(2)
    assert (one["views"], one["safe"], one["note"]) == (3**30 + 2, 1.0, b"")
    assert np.isnan(one["likes"])
    kept = rows_of(tmp_path / "out")[2]
    assert (kept["tags"], kept["a/b"], kept["video"], kept["likes"]) == (["a"], 2, "id2", None)


def test_a_clip_larger_than_a_record_is_left_out_by_its_size(meta, tmp_path):
    with (tmp_path / "files" / "02.mp4").open("r+b") as file:
        file.truncate(1 << 31)  # takes no space
    rows = records.read_table(meta).to_pylist()
    rows[2] |= dict(zip(("mtime_ns", "size_bytes"), file_stamp(rows[2]["path"]), strict=True))
    records.write_table(pa.Table.from_pylist(rows), meta)
    assert make(meta, tmp_path / "out").left_out == [
        ("larger than 2 GiB, which no record can be: cut it into clips", 1)
    ]


KILLED = """
import sys, time
from pathlib import Path
from opensora_jax.data.shards import shard_examples, shard_writer
from opensora_jax.data.table import records

original = shard_examples.TableClips._encoded

def hangs_at_the_ninth(self, **place):
    if place["path"].endswith("09.mp4"):
        print("hangs", flush=True)
        time.sleep(600)
    return original(self, **place)

shard_examples.TableClips._encoded = hangs_at_the_ninth
table = records.read_table(sys.argv[1])
shard_writer.write_shards(table, Path(sys.argv[2]), name="clips", shard_bytes=int(sys.argv[3]), num_workers=1)
"""


def test_a_killed_run_leaves_no_data_set_and_keeps_its_finished_shards(meta, tmp_path):
    out = tmp_path / "out"
    line = [sys.executable, "-c", KILLED, str(meta), str(out), str(SHARD_BYTES)]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout.readline() == b"hangs\n"
        os.kill(process.pid, signal.SIGKILL)
    finished = {path.name: path.stat().st_ino for path in shards_of(out)}
    assert 1 < len(finished) < 5
    assert not (out / "meta.parquet").exists()
    with pytest.raises(Exception, match=r"dataset_info\.json"):
        tfds.builder_from_directory(str(out))
    done = make(meta, out)
    assert done.new_shards == 5 - len(finished)
    assert finished.items() <= {path.name: path.stat().st_ino for path in shards_of(out)}.items()
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []
    make(meta, tmp_path / "straight")
    straight = [path.read_bytes() for path in shards_of(tmp_path / "straight")]
    assert [path.read_bytes() for path in shards_of(out)] == straight


def test_a_full_disk_is_an_os_error_and_the_next_run_continues(meta, tmp_path, monkeypatch):
    class Full(RecordWriter):
        def write(self, record):
            if self.path.name.endswith("00002-of-00005"):
                raise OSError(28, os.strerror(28), str(self.path))
            super().write(record)

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, "RecordWriter", Full)
        with pytest.raises(OSError, match="No space left"):
            make(meta, tmp_path / "out", num_workers=1)
    assert [path.name for path in tmp_path.glob("out/.*")] == []
    assert make(meta, tmp_path / "out").new_shards == 3
    check_clips(tmp_path / "out", GOOD)


def test_a_finished_folder_is_found_again_and_a_lost_shard_is_made_anew(meta, tmp_path):
    make(meta, tmp_path / "out")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert make(meta, tmp_path / "out", num_workers=1).new_shards == 0
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    shards_of(tmp_path / "out")[1].unlink()
    assert make(meta, tmp_path / "out").new_shards == 1
    check_clips(tmp_path / "out", GOOD)


@pytest.mark.parametrize("change", ["caption", "score", "file", "status", "name", "shard_bytes"])
def test_the_shards_of_another_table_are_refused(change, meta, tmp_path):
    make(meta, tmp_path / "out")
    rows = records.read_table(meta).to_pylist()
    columns = {
        "caption": {"text": "new"},
        "score": {"score": 0.5},
        "file": {"mtime_ns": 5},
        "status": {"status": "bad"},
    }
    rows[3] |= columns.get(change, {})
    records.write_table(pa.Table.from_pylist(rows), meta)
    settings = {"name": {"name": "others"}, "shard_bytes": {"shard_bytes": 4000}}.get(change, {})
    with pytest.raises(UserError, match="holds shards of another table, name or size"):
        make(meta, tmp_path / "out", **settings)


def test_clips_in_shards_are_sharded_again(meta, tmp_path):
    make(meta, tmp_path / "small")
    done = make(tmp_path / "small" / "meta.parquet", tmp_path / "large", shard_bytes=400_000)
    assert (done.clips, done.shards) == (12, 2)
    check_clips(tmp_path / "large", GOOD)


def test_a_moved_folder_is_read_where_it_is(meta, tmp_path):
    make(meta, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "moved")
    check_clips(tmp_path / "moved", GOOD)


def test_the_command_tells_what_it_wrote(meta, tmp_path, capsys):
    (tmp_path / "files" / "02.mp4").unlink()
    dataset.shard(meta, tmp_path / "out", "clips", 1, 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}/out: 11 clips in 1 shards, 1 of them new"
    assert lines[1] == "  left out, 1: no such file"
    dataset.shard(meta, tmp_path / "out", "clips", 1, 1)
    assert "11 clips in 1 shards, all there already" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a/b", "", "7up", "../up", "with space", "été"])
def test_a_name_that_no_data_set_can_have_is_refused(name, meta, tmp_path):
    with pytest.raises(UserError, match="--name="):
        make(meta, tmp_path / "out", name=name)
    assert not (tmp_path / "out").exists()


def test_an_output_with_other_things_is_refused_and_left_alone(meta, tmp_path):
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError, match="holds other things than shards"):
        make(meta, tmp_path)
    with pytest.raises(NotADirectoryError):
        make(meta, meta)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    (tmp_path / "empty").mkdir()
    assert make(meta, tmp_path / "empty").clips == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [({"status": "bad", "reason": "x"}, "None of the 13 rows is ok"), ({"size_bytes": 0}, "have no size_bytes")],
)
def test_a_table_without_clips_or_sizes_is_refused(change, message, meta, tmp_path):
    rows = [row | change for row in records.read_table(meta).to_pylist()]
    records.write_table(pa.Table.from_pylist(rows), meta)
    with pytest.raises(UserError, match=message):
        make(meta, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output=x"], "--meta is missing"),
        (["--meta=nowhere.parquet", "--output=x"], "Cannot read nowhere.parquet"),
        (["--meta=m.parquet", "--output=x", "--shard_mb=0"], "shard_mb"),
    ],
)
def test_a_mistake_is_one_line_and_status_1(command, arguments, message):
    result = command("dataset", "shard", *arguments, status=1)
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
