"""The table of a run over clips, and what it takes over from earlier runs; a fake run describes any bytes."""

import errno
import fcntl
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opensora_jax.config.errors import UserError
from opensora_jax.data.table import records
from opensora_jax.data.table.probing import NOTHING, file_stamp
from opensora_jax.data.table.records import read_table
from opensora_jax.data.table.sources import drop_repeats, list_clips
from opensora_jax.data.table.survey import make_table, summary

FINE = {"num_frames": 5, "height": 34, "width": 46, "aspect_ratio": 34 / 46, "resolution": 34 * 46, "fps": 8.0}


class FakeRun:
    """Calls every file that holds a number a video of so many frames; two clips at a time, the last ones first."""

    def __init__(self, stop_after: int | None = None):
        self.seen: list[str] = []
        self.stop_after = stop_after

    def __call__(self, clips: pa.Table):
        rows = clips.to_pylist()
        for first in range(0, len(rows), 2):
            if self.stop_after is not None and len(self.seen) >= self.stop_after:
                raise KeyboardInterrupt
            chunk = rows[::-1][first : first + 2]
            self.seen += [Path(row["path"]).name for row in chunk]
            yield [self.describe(**row) for row in chunk]

    def describe(self, path: str, shard: str, record: int) -> dict:
        mtime_ns, size_bytes = file_stamp(shard or path)
        row = {"path": path, "shard": shard, "record": record, "mtime_ns": mtime_ns, "size_bytes": size_bytes}
        text = {"text": f"stored {record}"} if shard else {}
        content = Path(shard or path).read_text() if size_bytes else "no such file"
        fine = FINE | {"num_frames": int(content), "status": "ok"} if content.isdigit() else {"reason": content}
        return NOTHING | row | text | fine


@pytest.fixture
def files(tmp_path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    for name, content in {"a": "3", "b": "5", "c": "damaged", "d": "7", "e": "11"}.items():
        (folder / f"{name}.mp4").write_text(content)
    return folder


def survey(source: Path, output: Path, run: FakeRun | None = None, **settings) -> tuple[list[str], pa.Table]:
    """Returns the names of what was probed, and the table."""
    run = run or FakeRun()
    clips, _ = drop_repeats(list_clips(source).clips)
    written = make_table(clips, output, run, 2, **settings)
    assert repr(read_table(output).to_pylist()) == repr(written.to_pylist())
    assert sorted(os.listdir(output.parent)) == sorted({output.name, *(["files"] if source.is_dir() else [])})
    return sorted(run.seen), written


ALL = ["a.mp4", "b.mp4", "c.mp4", "d.mp4", "e.mp4"]


@pytest.mark.parametrize("name", ["t.parquet", "t.csv"])
def test_a_second_run_probes_what_is_new_changed_or_bad(files, tmp_path, name):
    assert survey(files, tmp_path / name)[0] == ALL
    (files / "b.mp4").write_text("13")
    (files / "d.txt").write_text("a new caption")
    (files / "e.mp4").unlink()
    (files / "f.mp4").write_text("17")
    probed, table = survey(files, tmp_path / name)
    assert probed == ["b.mp4", "c.mp4", "f.mp4"]
    assert table["num_frames"].to_pylist() == [3, 13, 0, 7, 17]
    assert table["text"].to_pylist() == ["a", "b", "c", "a new caption", "f"]
    assert table["reason"].to_pylist() == ["", "", "damaged", "", ""]


def test_the_order_of_rows_is_that_of_the_source(files, tmp_path):
    (tmp_path / "list.csv").write_text("path,text\n" + "".join(f"files/{name},x\n" for name in ALL[::-1]))
    _, table = survey(tmp_path / "list.csv", tmp_path / "out" / "t.parquet")
    assert [Path(path).name for path in table["path"].to_pylist()] == ALL[::-1]


@pytest.mark.parametrize("torn", [b"", b'{"path": "/some', b'{"text": "' + b"a" * (1 << 18)])
def test_an_interrupted_run_keeps_what_it_has_probed(files, tmp_path, torn):
    with pytest.raises(KeyboardInterrupt):
        survey(files, tmp_path / "t.parquet", FakeRun(stop_after=4))
    assert sorted(os.listdir(tmp_path)) == ["files", "t.parquet.partial"]
    with (tmp_path / "t.parquet.partial").open("ab") as file:
        file.write(torn)
    (files / "d.mp4").write_text("13")
    probed, table = survey(files, tmp_path / "t.parquet")
    assert probed == ["a.mp4", "d.mp4"]
    assert table["num_frames"].to_pylist() == [3, 5, 0, 13, 11]


def test_a_partial_file_with_other_contents_is_the_users_mistake(files, tmp_path):
    (tmp_path / "t.parquet.partial").write_text("no lines of JSON\n")
    with pytest.raises(UserError, match=r"t\.parquet\.partial, left by an earlier run, cannot be read: delete it"):
        survey(files, tmp_path / "t.parquet")


def test_a_second_run_at_the_same_time_is_refused(files, tmp_path):
    class Second(FakeRun):
        def __call__(self, clips):
            with pytest.raises(UserError, match="Another run holds"):
                survey(files, tmp_path / "t.parquet")
            yield from super().__call__(clips)

    assert survey(files, tmp_path / "t.parquet", Second())[0] == ALL


def test_a_file_system_without_locks_is_no_obstacle(files, tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert survey(files, tmp_path / "t.parquet")[0] == ALL


def test_two_interrupted_runs_add_up(files, tmp_path):
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            survey(files, tmp_path / "t.parquet", FakeRun(stop_after=2))
    assert survey(files, tmp_path / "t.parquet")[0] == ["a.mp4"]


def test_scores_of_the_source_stay_and_those_added_to_the_table_too(files, tmp_path):
    source, output = tmp_path / "list.parquet", tmp_path / "out" / "t.parquet"
    paths = [f"files/{name}" for name in ALL]
    pq.write_table(pa.table({"path": paths, "text": ALL, "score_aes": [1.5, 2.5, 3.5, 4.5, 5.5]}), source)
    _, table = survey(source, output)
    assert table.column_names == [*records.SCHEMA.names, "score_aes"]
    records.write_table(table.append_column("score_vmafmotion", pa.array([1, 2, 3, 4, 5])), output)
    (files / "b.mp4").write_text("13")
    _, table = survey(source, output)
    assert table["score_aes"].to_pylist() == [1.5, 2.5, 3.5, 4.5, 5.5]
    assert table["score_vmafmotion"].to_pylist() == [1, None, None, 4, 5]  # b and c were probed anew


def test_a_table_can_be_its_own_source(files, tmp_path):
    output = tmp_path / "t.parquet"
    survey(files, output)
    assert survey(output, tmp_path / "t2" / "t.parquet")[0] == ALL
    clips, _ = drop_repeats(list_clips(output).clips)
    run = FakeRun()
    make_table(clips, output, run, 2)
    assert run.seen == ["c.mp4"]


def test_clips_in_shards_bring_their_captions_unless_the_source_has_some(files, tmp_path):
    shard = str(files / "a.mp4")
    clips = pa.table({"path": ["x", "y"], "shard": [shard] * 2, "record": [0, 1], "text": pa.array([None, "own"])})
    run, output = FakeRun(), tmp_path / "t.parquet"
    assert make_table(clips, output, run, 2)["text"].to_pylist() == ["stored 0", "own"]
    assert make_table(clips, output, run, 2)["text"].to_pylist() == ["stored 0", "own"]
    assert len(run.seen) == 2
    make_table(clips, output, run, 2, distrusted=True)
    assert len(run.seen) == 4


def test_if_nothing_is_usable_the_earlier_table_stays_as_it_is(files, tmp_path):
    survey(files, tmp_path / "t.parquet")
    before = (tmp_path / "t.parquet").read_bytes()
    for name in ALL:
        (files / name).write_text("gone bad" if name < "c" else "worse")
    with pytest.raises(UserError, match=r"None of the 5 clips can be used .3 bad: worse, first .*; 2 bad: gone bad"):
        survey(files, tmp_path / "t.parquet")
    assert (tmp_path / "t.parquet").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["files", "t.parquet"]


def test_a_file_that_is_no_table_is_not_overwritten(files, tmp_path):
    output = tmp_path / "t.csv"
    output.write_text("path,text\na.mp4,x\n")
    with pytest.raises(UserError, match=r"--output=.*t\.csv is there and cannot be continued: .* lacks num_frames"):
        survey(files, output)
    assert output.read_text() == "path,text\na.mp4,x\n"


def test_a_format_that_cannot_be_written_is_refused_before_the_work(files, tmp_path):
    run = FakeRun()
    with pytest.raises(UserError, match=r"\.parquet or \.csv"):
        survey(files, tmp_path / "t.json", run)
    clips = list_clips(files).clips.append_column("boxes", pa.array([[1]] * 5))
    with pytest.raises(UserError, match="The column boxes"):
        make_table(clips, tmp_path / "t.csv", run, 2)
    assert (run.seen, os.listdir(tmp_path)) == ([], ["files"])


def test_the_summary_counts_by_reason_and_names_the_first_of_each(files, tmp_path):
    (files / "f.mp4").write_text("damaged")
    (files / "g.mp4").write_text("1")
    (files / "h.png").write_text("1")
    (files / "h.txt").write_text("")
    (files / "i.mp4").write_text("worse")
    _, table = survey(files, tmp_path / "t.parquet")
    assert summary(table, ["x.mp4", "y.mp4"], ["notes.md"]) == [
        "6 of 9 clips are usable: 4 videos, 2 images",
        f"       2 bad: damaged, first {files}/c.mp4",
        f"       1 bad: worse, first {files}/i.mp4",
        "       2 left out: the clip of an earlier row again, first x.mp4",
        "       1 skipped: not named as a video or an image, first notes.md",
        f"       1 without a caption, first {files}/h.png",
        f"       1 named as videos but of one frame: they count as images, first {files}/g.mp4",
    ]
