import math
import os

import numpy as np
import pyarrow as pa
import pytest

from opensora_jax.config.errors import UserError
from opensora_jax.data import records
from opensora_jax.data.records import describe, list_videos, read_table, write_table
from opensora_jax.data.video import write_video

REFERENCE_CSV = """path,text,num_frames,height,width,aspect_ratio,resolution,fps,score_vmafmotion
a.mp4,"one, with a comma",97,720,1280,0.5625,921600,24.0,3.5
b.jpg,two,1,31,47,0.66,1457,,
"""


def touch(folder, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def clip_rows(folder) -> list[dict]:
    path = write_video(folder / "clip.mp4", np.zeros((5, 34, 46, 3), np.uint8), 8)
    return [describe(str(path), "black"), describe(str(folder / "none.mp4"), "gone")]


def test_a_good_file_gives_a_full_row(tmp_path):
    row, _ = clip_rows(tmp_path)
    stat = os.stat(row["path"])
    assert row == {
        "path": str(tmp_path / "clip.mp4"),
        "text": "black",
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


def test_a_bad_file_gives_a_row_with_the_reason(tmp_path):
    _, row = clip_rows(tmp_path)
    assert (row["status"], row["reason"], row["num_frames"]) == ("bad", "no such file", 0)
    assert describe(str(tmp_path / "zero\0byte.mp4"), "")["reason"] == "no such file"
    assert describe(os.fsdecode(b"\xff.mp4"), "")["reason"] == "the file name is not UTF-8"


@pytest.mark.parametrize("name", ["table.parquet", "table.csv"])
def test_a_table_is_read_as_it_was_written(tmp_path, name):
    table = pa.Table.from_pylist(clip_rows(tmp_path), schema=records.SCHEMA)
    write_table(table, tmp_path / "new" / name)
    read = read_table(tmp_path / "new" / name)
    assert read.schema.equals(records.SCHEMA)
    assert read.slice(0, 1).to_pylist() == table.slice(0, 1).to_pylist()
    assert read["reason"].to_pylist() == ["", "no such file"]
    assert os.listdir(tmp_path / "new") == [name]


def test_a_table_of_the_reference_is_read_with_its_extra_columns(tmp_path):
    (tmp_path / "table.csv").write_text(REFERENCE_CSV)
    table = read_table(tmp_path / "table.csv")
    assert table.column_names == [*records.SCHEMA.names, "score_vmafmotion"]
    assert table["text"].to_pylist() == ["one, with a comma", "two"]
    assert table["status"].to_pylist() == ["ok", "ok"]
    assert table["score_vmafmotion"].to_pylist() == [3.5, None]
    assert table["fps"][0].as_py() == 24
    assert math.isnan(table["fps"][1].as_py())


def test_whole_numbers_written_as_floats_are_read(tmp_path):
    (tmp_path / "table.csv").write_text(REFERENCE_CSV.replace("97,720", "97.0,720.0"))
    assert read_table(tmp_path / "table.csv")["num_frames"].to_pylist() == [97, 1]


def test_a_row_without_frames_becomes_bad(tmp_path):
    (tmp_path / "table.csv").write_text(REFERENCE_CSV.replace("97,720", ",720"))
    table = read_table(tmp_path / "table.csv")
    assert table["status"].to_pylist() == ["bad", "ok"]
    assert table["reason"][0].as_py() == "the row lacks frames or size"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.parquet", None, "Cannot read .*none.parquet"),
        ("table.json", "{}", "Cannot read .*table.json"),
        ("broken.parquet", "no parquet", "Cannot read .*broken.parquet"),
        ("empty.csv", "", "Cannot read .*empty.csv"),
        ("short.csv", "path,text\na.mp4,one\n", "short.csv lacks num_frames, height"),
        ("words.csv", REFERENCE_CSV.replace("97", "many"), "words.csv has a value of the wrong type"),
    ],
)
def test_a_wrong_table_is_the_users_mistake(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_table(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_table_is_parquet_or_csv(tmp_path):
    with pytest.raises(UserError, match=r"\.parquet or \.csv"):
        write_table(pa.table({"path": ["a"]}), tmp_path / "table.txt")


def test_a_folder_lists_videos_and_images_with_their_captions(tmp_path):
    touch(tmp_path, "b/deep_red-car.MP4", "a.jpg", "c.mkv", "notes.md", ".hidden.mp4")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfbeside\n")
    (tmp_path / "captions.csv").write_text("path,text\nc.mkv,from the table\na.jpg,not this one\n")
    assert list_videos(tmp_path) == [
        (str(tmp_path / "a.jpg"), "beside"),
        (str(tmp_path / "b/deep_red-car.MP4"), "deep red car"),
        (str(tmp_path / "c.mkv"), "from the table"),
    ]


def test_paths_of_a_table_are_relative_to_it(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    text = 'path,text\na.mp4,"two\nlines"\n/abs/b.mp4,\nhttps://x.org/c.mp4,URL\n'
    (tmp_path / "sub/list.csv").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert list_videos("sub/list.csv") == [
        (str(tmp_path / "sub/a.mp4"), "two\nlines"),
        ("/abs/b.mp4", ""),
        ("https://x.org/c.mp4", "URL"),
    ]


def test_a_caption_that_is_not_utf8_keeps_what_can_be_read(tmp_path):
    (tmp_path / "list.csv").write_bytes(b"path,text\na.mp4,caf\xe9\n")
    assert list_videos(tmp_path / "list.csv")[0][1] == "caf\N{REPLACEMENT CHARACTER}"


def test_no_data_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="No data at"):
        list_videos(tmp_path / "nowhere")
    with pytest.raises(UserError, match="No videos in"):
        list_videos(tmp_path)
    (tmp_path / "list.csv").write_text("file,text\na.mp4,one\n")
    with pytest.raises(UserError, match="lacks path"):
        list_videos(tmp_path / "list.csv")
