import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opensora_jax.config.errors import UserError
from opensora_jax.data.table.sources import drop_repeats, list_clips

MISREAD = "\N{REPLACEMENT CHARACTER}"


def touch(folder, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def pairs(source) -> list[tuple[str, str]]:
    clips = list_clips(source).clips
    assert set(clips["shard"].to_pylist()) == {""}
    return list(zip(clips["path"].to_pylist(), clips["text"].to_pylist(), strict=True))


def test_a_folder_lists_videos_and_images_with_their_captions(tmp_path):
    touch(tmp_path, "b/deep_red-car.MP4", "a.jpg", "c.mkv", "notes.md", ".hidden.mp4")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfbeside\n")
    (tmp_path / "captions.csv").write_text("path,text\nc.mkv,from the table\na.jpg,not this one\n")
    assert pairs(tmp_path) == [
        (str(tmp_path / "a.jpg"), "beside"),
        (str(tmp_path / "b/deep_red-car.MP4"), "deep red car"),
        (str(tmp_path / "c.mkv"), "from the table"),
    ]


def test_folders_behind_links_are_searched_and_hidden_ones_are_not(tmp_path):
    for name in ("disk/part/a.mp4", "videos/b.mp4", "videos/.thumbnails/c.mp4", "videos/.d.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "videos" / "linked").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "back").symlink_to(tmp_path / "videos")
    found = list_clips(tmp_path / "videos").clips["path"].to_pylist()
    assert [str(Path(path).relative_to(tmp_path / "videos")) for path in found] == ["b.mp4", "linked/part/a.mp4"]


def test_the_table_of_a_folder_gives_captions_scores_and_what_else_it_names(tmp_path, monkeypatch):
    touch(tmp_path, "set/a.mp4", "set/b.mp4", "set/c.dat", "set/d.png")
    rows = "a.mp4,first,1.5\ngone.mp4,x,2.5\na.mp4,second,3.5\nc.dat,named here,4.5\n./d.png,,5.5\n"
    (tmp_path / "set/captions.csv").write_text(f"path,text,score_aes\n{rows}")
    monkeypatch.chdir(tmp_path)
    found = list_clips("set")
    clips, repeats = drop_repeats(found.clips)
    assert [(Path(row["path"]).name, row["text"], row["score_aes"]) for row in clips.to_pylist()] == [
        ("a.mp4", "first", 1.5),
        ("b.mp4", "b", None),
        ("d.png", "", 5.5),
        ("gone.mp4", "x", 2.5),
        ("c.dat", "named here", 4.5),
    ]
    assert repeats == [str(tmp_path / "set/a.mp4")]
    assert found.skipped == []


def test_files_of_a_folder_that_are_no_clips_by_their_name_are_told(tmp_path):
    touch(tmp_path, "a.mp4", "sub/b.heic", "notes.txt", "a.txt", "captions.txt", "dir.heic/c.png", ".hidden.heic")
    (tmp_path / "captions.csv").write_text("path,text\na.mp4,x\n")
    found = list_clips(tmp_path)
    assert [Path(path).name for path in found.clips["path"].to_pylist()] == ["a.mp4", "c.png"]
    assert found.skipped == [str(tmp_path / name) for name in ("captions.txt", "notes.txt", "sub/b.heic")]


def test_bytes_of_a_caption_file_that_are_no_utf8_are_replaced(tmp_path):
    touch(tmp_path, "a.mp4")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 \xff\xfe\n")
    assert pairs(tmp_path) == [(str(tmp_path / "a.mp4"), f"caf{MISREAD} {MISREAD}{MISREAD}")]


def test_names_of_files_that_are_no_utf8_stay_recognisable(tmp_path):
    touch(tmp_path, os.fsdecode(b"caf\xe9.mp4"))
    assert pairs(tmp_path) == [(f"{tmp_path}/caf{MISREAD}.mp4", f"caf{MISREAD}")]


def test_paths_of_a_table_are_relative_to_it(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    text = 'path,text\na.mp4,"two\nlines"\n/abs/b.mp4,\nhttps://x.org/c.mp4,URL\n../d.mp4,nan\n,no path\n'
    (tmp_path / "sub/list.csv").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert pairs("sub/list.csv") == [
        (str(tmp_path / "sub/a.mp4"), "two\nlines"),
        ("/abs/b.mp4", ""),
        ("https://x.org/c.mp4", "URL"),
        (str(tmp_path / "d.mp4"), ""),
        ("", "no path"),
    ]


def test_a_caption_that_is_not_utf8_keeps_what_can_be_read(tmp_path):
    (tmp_path / "list.csv").write_bytes(b"path,text\na.mp4,caf\xe9\n")
    assert pairs(tmp_path / "list.csv")[0][1] == f"caf{MISREAD}"


def test_further_columns_of_a_table_stay_and_its_facts_are_not_believed(tmp_path):
    table = {
        "score_aes": [4.5, 5.5],
        "path": ["a", "b"],
        "text": ["x", "y"],
        "num_frames": [97, 10**9],
        "tag": ["m"] * 2,
    }
    pq.write_table(pa.table(table), tmp_path / "list.parquet")
    clips = list_clips(tmp_path / "list.parquet").clips
    assert clips.column_names == ["path", "shard", "record", "text", "score_aes", "tag"]
    assert clips["score_aes"].to_pylist() == [4.5, 5.5]


def test_clips_in_shards_are_listed_by_shard_and_number(tmp_path):
    table = {"path": ["one", "two", "c.mp4"], "shard": ["s-0", "s-0", ""], "record": [0, 5, 0], "text": ["x", "y", "z"]}
    pq.write_table(pa.table(table), tmp_path / "list.parquet")
    clips = list_clips(tmp_path / "list.parquet").clips
    assert clips["path"].to_pylist() == ["one", "two", str(tmp_path / "c.mp4")]
    assert clips["shard"].to_pylist() == [str(tmp_path / "s-0")] * 2 + [""]
    assert clips["record"].to_pylist() == [0, 5, 0]


def test_of_rows_that_name_a_clip_again_the_first_counts(tmp_path):
    (tmp_path / "list.csv").write_text("path,text\na.mp4,first\nb.mp4,b\n./a.mp4,second\nsub/../b.mp4,b\na.mp4,third\n")
    clips, repeats = drop_repeats(list_clips(tmp_path / "list.csv").clips)
    assert clips["text"].to_pylist() == ["first", "b"]
    assert repeats == [str(tmp_path / name) for name in ("a.mp4", "b.mp4", "a.mp4")]


def test_records_of_a_shard_may_have_one_name():
    table = {"path": ["x"] * 3, "shard": ["s", "s", "t"], "record": [0, 1, 0], "text": [""] * 3}
    clips, repeats = drop_repeats(pa.table(table))
    assert (len(clips), repeats) == (3, [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,text\na.mp4,one\n", "lacks path: it has file, text and needs path,text"),
        ("path;text\na.mp4;one\n", "lacks path, text: it has path;text and needs"),
        ("path,caption\na.mp4,one\n", "lacks text"),
        ("path,text\n", "No clips in"),
        ("", "Cannot read"),
    ],
)
def test_a_list_without_clips_is_the_users_mistake(tmp_path, content, message):
    (tmp_path / "list.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        list_clips(tmp_path / "list.csv")


def test_a_place_without_clips_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="No data at"):
        list_clips(tmp_path / "nowhere")
    touch(tmp_path, "notes.md")
    with pytest.raises(UserError, match="No clips in"):
        list_clips(tmp_path)
    with pytest.raises(UserError, match=r"notes\.md: it must be"):
        list_clips(tmp_path / "notes.md")


def test_a_folder_above_a_tfds_set_is_told_where_it_is(tmp_path):
    touch(tmp_path, "set/1.0.0/dataset_info.json")
    with pytest.raises(UserError, match=r"There is a TFDS set in .*set/1\.0\.0: give that folder"):
        list_clips(tmp_path)
