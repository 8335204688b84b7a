import csv
import math
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opensora_jax.config.errors import UserError
from opensora_jax.data.media.video_writer import write_video
from opensora_jax.data.table import records
from opensora_jax.data.table.probing import describe
from opensora_jax.data.table.records import read_table, write_table

REFERENCE_CSV = """path,text,num_frames,height,width,aspect_ratio,resolution,fps,score_vmafmotion
a.mp4,"one, with a comma",97,720,1280,0.5625,921600,24.0,3.5
b.jpg,two,1,31,47,0.66,1457,,
"""


def made(folder) -> pa.Table:
    """A table of a clip and of a file that is missing."""
    path = write_video(folder / "clip.mp4", np.zeros((5, 34, 46, 3), np.uint8), 8)
    rows = [describe(str(path)) | {"text": "black"}, describe(str(folder / "none.mp4")) | {"text": "gone"}]
    return pa.Table.from_pylist(rows, schema=records.SCHEMA)


def reference(folder, old: str = "", new: str = "") -> pa.Table:
    """The table of the reference, with something in it replaced."""
    (folder / "table.csv").write_text(REFERENCE_CSV.replace(old, new))
    return read_table(folder / "table.csv")


@pytest.mark.parametrize("name", ["table.parquet", "table.csv", "TABLE.CSV"])
def test_a_table_is_read_as_it_was_written(tmp_path, name):
    table = made(tmp_path)
    write_table(table, tmp_path / "new" / name)
    read = read_table(tmp_path / "new" / name)
    assert read.schema.equals(records.SCHEMA)
    assert read.slice(0, 1).to_pylist() == table.slice(0, 1).to_pylist()
    assert read["reason"].to_pylist() == ["", "no such file"]
    assert os.listdir(tmp_path / "new") == [name]


@pytest.mark.parametrize("name", ["table.parquet", "table.csv"])
def test_shards_move_with_the_folder_of_their_table(tmp_path, name):
    inside, outside = str(tmp_path / "old" / "sub" / "a-0"), str(tmp_path / "older" / "b-0")
    table = records.with_column(made(tmp_path), "shard", pa.array([inside, outside]))
    table = records.with_column(table, "record", pa.array([7, 5]))
    write_table(table, tmp_path / "old" / name)
    (tmp_path / "old").rename(tmp_path / "moved")
    read = read_table(tmp_path / "moved" / name)
    assert read["shard"].to_pylist() == [str(tmp_path / "moved" / "sub" / "a-0"), outside]
    assert read["record"].to_pylist() == [7, 5]


def test_a_csv_has_what_the_reference_reads(tmp_path):
    table = made(tmp_path).slice(0, 1)
    image = table.slice(0, 1).set_column(9, "fps", pa.array([math.nan]))
    table = pa.concat_tables([table, image]).append_column("score_vmafmotion", pa.array([3.5, None]))
    write_table(records.with_column(table, "text", pa.array(['two\nlines, "quoted"', ""])), tmp_path / "t.csv")
    with open(tmp_path / "t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    (header, _) = REFERENCE_CSV.split("\n", 1)
    assert [rows[0][name] for name in header.split(",")] == [
        str(tmp_path / "clip.mp4"),
        'two\nlines, "quoted"',
        "5",
        "34",
        "46",
        str(34 / 46),
        str(34 * 46),
        "8",
        "3.5",
    ]
    assert (rows[1]["fps"], rows[1]["score_vmafmotion"], rows[1]["text"]) == ("nan", "", "")  # pandas reads NaN


def test_a_table_of_the_reference_is_read_with_its_extra_columns(tmp_path):
    table = reference(tmp_path)
    assert table.column_names == [*records.SCHEMA.names, "score_vmafmotion"]
    assert table["text"].to_pylist() == ["one, with a comma", "two"]
    assert table["status"].to_pylist() == ["ok", "ok"]
    assert table["shard"].to_pylist() == ["", ""]
    assert table["score_vmafmotion"].to_pylist() == [3.5, None]
    assert table["fps"][0].as_py() == 24
    assert math.isnan(table["fps"][1].as_py())


def test_whole_numbers_written_as_floats_are_read(tmp_path):
    assert reference(tmp_path, "97,720", "97.0,720.0")["num_frames"].to_pylist() == [97, 1]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("97,720", ",720", "the row lacks frames or size: num_frames 0 height 720 width 1280"),
        ("97,720", "nan,720", "the row lacks frames or size: num_frames 0 height 720 width 1280"),
        ("97,720", "97,-720", "the row lacks frames or size: num_frames 97 height -720 width 1280"),
        ("97,720", "97,inf", "the row lacks frames or size: num_frames 97 height 0 width 1280"),
        ("97,720", "1000000000,720", "more than a clip can have: num_frames 1000000000 height 720 width 1280"),
        ("1280", "70000", "more than a clip can have: num_frames 97 height 720 width 70000"),
        ("24.0", "0", "no frame rate: fps 0"),
        ("24.0", "inf", "no frame rate: fps inf"),
        ("24.0", "-24", "no frame rate: fps -24"),
        ("24.0", "", "no frame rate: fps nan"),
        ("24.0", "1e300", "more than a clip can have: fps 1e+300"),
        ("24.0", "1000.1", "more than a clip can have: fps 1000.1"),
    ],
)
def test_a_row_with_impossible_numbers_becomes_bad(tmp_path, old, new, reason):
    table = reference(tmp_path, old, new)
    assert table["status"].to_pylist() == ["bad", "ok"]
    assert table["reason"].to_pylist() == [reason, ""]


def test_captions_are_text_whatever_other_tools_wrote(tmp_path):
    numbers = {name: pa.array([1, 1, 1]) for name in records.REQUIRED if name not in ("path", "text", "fps")}
    numbers |= {"path": pa.array(["a", "b", "c"]), "fps": pa.nulls(3, pa.float64())}
    for column, texts in (
        (pa.array([math.nan, None, math.nan]), ["", "", ""]),
        (pa.array([b"caf\xe9", b"", None], pa.binary()), ["caf\N{REPLACEMENT CHARACTER}", "", ""]),
        (pa.array(["cat", "nan", None]).dictionary_encode(), ["cat", "", ""]),
        (pa.array([7, 8, None]), ["7", "8", ""]),
    ):
        pq.write_table(pa.table(numbers | {"text": column}), tmp_path / "t.parquet")
        assert read_table(tmp_path / "t.parquet")["text"].to_pylist() == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.parquet", None, "Cannot read .*none.parquet"),
        ("table.json", "{}", "Cannot read .*table.json"),
        ("broken.parquet", "no parquet", "Cannot read .*broken.parquet"),
        ("empty.csv", "", "Cannot read .*empty.csv"),
        ("ragged.csv", "path,text\na.mp4,one,two\n", "Cannot read .*ragged.csv .*Expected 2 columns, got 3"),
        ("short.csv", "path,text\na.mp4,one\n", "short.csv lacks num_frames, height.* it has path, text"),
        ("words.csv", REFERENCE_CSV.replace("97", "many"), "words.csv has a value of the wrong type in num_frames"),
        ("rate.csv", REFERENCE_CSV.replace("24.0", "fast"), "rate.csv has a value of the wrong type in fps: .*fast"),
        ("twice.csv", REFERENCE_CSV.replace("score_vmafmotion", "text"), "several columns named text"),
        ("more.csv", "path,text,score,score\na.mp4,a,1,2\n", "several columns named score"),
    ],
)
def test_a_wrong_table_is_the_users_mistake(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_table(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_parquet_damaged_inside_is_the_users_mistake(tmp_path):
    path = tmp_path / "table.parquet"
    write_table(made(tmp_path), path)
    data = bytearray(path.read_bytes())
    data[4:600] = bytes(596)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"Cannot read .*table\.parquet"):
        read_table(path)


def test_a_caption_column_that_holds_lists_is_the_users_mistake(tmp_path):
    table = made(tmp_path).set_column(3, "text", pa.array([["a"], ["b", "c"]]))
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(UserError, match="wrong type in text"):
        read_table(tmp_path / "t.parquet")


def test_a_table_is_parquet_or_csv(tmp_path):
    with pytest.raises(UserError, match=r"\.parquet or \.csv"):
        write_table(pa.table({"path": ["a"]}), tmp_path / "table.txt")


def test_a_column_that_a_csv_cannot_hold_is_named(tmp_path):
    with pytest.raises(UserError, match=r"The column boxes \(list.*\) cannot stand in a CSV: write a \.parquet"):
        write_table(pa.table({"path": ["a"], "boxes": [[1, 2]]}), tmp_path / "table.csv")
    assert os.listdir(tmp_path) == []


def test_rows_are_taken_block_by_block_and_texts_keep_their_type(monkeypatch):
    monkeypatch.setattr(records, "TAKEN", 2)
    column = pa.chunked_array([["a", "b"], ["c", None]], pa.string())
    found = records.take(column, pa.array([3, 0, 2, None, 1]))
    assert (found.to_pylist(), found.type) == ([None, "a", "c", None, "b"], pa.string())
    assert records.numbered(column).indices.to_pylist() == [0, 1, 2, None]
    renamed = records.map_shards(pa.table({"shard": ["a", "b", "", "a", "b"]}), str.upper)["shard"]
    assert [chunk.to_pylist() for chunk in renamed.chunks] == [["A", "B"], ["", "A"], ["B"]]  # each far below 2 GiB
    assert renamed.type == pa.string()
