"""`dataset meta` over real files of every kind that a folder can hold, and the commands as processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from opensora_jax import dataset
from opensora_jax.config.errors import UserError
from opensora_jax.data.clips import ClipDataset
from opensora_jax.data.loader import make_loader
from opensora_jax.data.media.ffmpeg_process import binary
from opensora_jax.data.media.transforms import resize_and_crop
from opensora_jax.data.media.video_writer import write_video
from opensora_jax.data.plan.plan import Plan
from opensora_jax.data.shards.shard_writer import write_shards
from opensora_jax.data.table import records

ROOT = Path(__file__).parents[1]

USABLE = {  # name: frames, height, width
    "a.mp4": (7, 34, 46),
    "b.mp4": (5, 62, 38),
    "c.png": (1, 31, 47),
    "cut.mp4": (4, 34, 46),  # the end is missing; its index is at the front
    "huge_in_words.mp4": (7, 34, 46),  # its container says 65535x65535
    "mp4_in.jpg": (7, 34, 46),
    "odd_size.mp4": (4, 31, 47),
    "one_frame.mp4": (1, 34, 46),
    "png_in.mp4": (1, 31, 47),
    "rotated.mp4": (7, 46, 34),
    "variable.mp4": (5, 34, 46),
}
BAD = {
    "empty.mp4": "the file is empty",
    "fast.mp4": "more than a clip can have: fps 5",  # 50000
    "folder.mp4": "not a file",
    "garbled.png": "the video stream holds no frames",
    "headless.mp4": "ffmpeg: moov atom not found",
    "huge.png": "the video stream holds no frames",  # says that it has 10^6 x 10^6 pixels
    "list.mp4": "a list of files to play, not a video",
    "long_in_words.mp4": "ffmpeg: error reading header",  # says that it has 2^31 frames
    "sound.mp4": "no video stream in the file",
    "words.mp4": "ffmpeg: ",
}
NAMED_IN_TABLES = {"words.nfo": "text, not a video"}  # a folder's file is known by its suffix


@pytest.fixture
def dataset_command(command):
    """Returns a function that runs the command, however it ends."""

    def run(*arguments, **environment):
        return command("dataset", *arguments, status=None, environment=environment)

    return run


def ffmpeg(*arguments: str | Path) -> None:
    line = [binary(), "-nostdin", "-loglevel", "error", *map(str, arguments)]
    subprocess.run(line, check=True, timeout=60)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with all of USABLE, BAD and NAMED_IN_TABLES."""
    folder = tmp_path_factory.mktemp("files")
    noise = np.random.default_rng(0).integers(0, 256, (7, 34, 46, 3), np.uint8)
    clip = write_video(folder / "a.mp4", noise, 8)
    write_video(folder / "b.mp4", np.full((5, 62, 38, 3), 77, np.uint8), 29.97)
    image = write_video(folder / "c.png", np.full((1, 31, 47, 3), 77, np.uint8), 8)
    data = clip.read_bytes()
    (folder / "cut.mp4").write_bytes(data[: -len(data) // 4])
    (folder / "headless.mp4").write_bytes(data[: data.index(b"moov")])
    shutil.copy(clip, folder / "mp4_in.jpg")
    shutil.copy(image, folder / "png_in.mp4")
    test_source = ("-f", "lavfi", "-i", "testsrc=size=47x31:rate=8:duration=0.5")
    ffmpeg(*test_source, "-c:v", "libx264", "-pix_fmt", "yuv444p", folder / "odd_size.mp4")
    ffmpeg("-i", clip, "-frames:v", "1", folder / "one_frame.mp4")
    ffmpeg("-display_rotation", "90", "-i", clip, "-c", "copy", folder / "rotated.mp4")
    gap = "select='not(between(n,2,3))'"
    ffmpeg("-i", clip, "-vf", gap, "-fps_mode", "passthrough", folder / "variable.mp4")
    ffmpeg("-f", "lavfi", "-i", "sine=duration=0.2", folder / "sound.mp4")
    ffmpeg("-r", "50000", "-i", clip, "-r", "50000", "-c:v", "libx264", folder / "fast.mp4")
    shape = {b"tkhd": (76, b"\xff\xff\0\0" * 2), b"avc1": (24, b"\xff" * 4)}
    (folder / "huge_in_words.mp4").write_bytes(patched(data, shape))
    (folder / "long_in_words.mp4").write_bytes(patched(data, {b"stsz": (8, b"\x7f\xff\xff\xff")}))
    (folder / "empty.mp4").touch()
    (folder / "folder.mp4").mkdir()
    png = image.read_bytes()
    (folder / "garbled.png").write_bytes(png[:45] + bytes(len(png) - 45))
    (folder / "huge.png").write_bytes(png[:16] + (10**6).to_bytes(4, "big") * 2 + png[24:])
    (folder / "list.mp4").write_text("ffconcat version 1.0\nfile a.mp4\n")
    for name in ("words.mp4", "words.nfo"):
        (folder / name).write_text("no video at all\n" * 20)
    return folder


def patched(data: bytes, changes: dict[bytes, tuple[int, bytes]]) -> bytes:
    """Returns an MP4 with bytes changed in boxes: name -> (place after the name, what stands there)."""
    for box, (place, new) in changes.items():
        start = data.index(box) + len(box) + place
        data = data[:start] + new + data[start + len(new) :]
    return data


def rows_of(table: Path) -> dict[str, dict]:
    return {Path(row["path"]).name: row for row in records.read_table(table).to_pylist()}


def write_list(path: Path, files: Path, names: list[str]) -> Path:
    path.write_text("path,text\n" + "".join(f"{files / name},a caption\n" for name in names))
    return path


def test_meta_tells_usable_files_from_bad_ones(files, tmp_path, capfd):
    dataset.meta(files, tmp_path / "meta.parquet", 2)
    rows = rows_of(tmp_path / "meta.parquet")
    sizes = {name: (r["num_frames"], r["height"], r["width"]) for name, r in rows.items() if r["status"] == "ok"}
    assert sizes == USABLE
    reasons = {name: row["reason"] for name, row in rows.items() if row["status"] == "bad"}
    assert reasons.keys() == BAD.keys()
    assert {name: reason[: len(BAD[name])] for name, reason in reasons.items()} == BAD
    assert [name for name, row in rows.items() if row["variable_fps"]] == ["variable.mp4"]
    assert [name for name, row in rows.items() if np.isnan(row["fps"]) and name in USABLE] == [
        "c.png",
        "one_frame.mp4",
        "png_in.mp4",
    ]
    assert rows["b.mp4"]["fps"] == pytest.approx(29.97)
    printed, bar = capfd.readouterr()
    lines = printed.splitlines()
    assert lines[0] == f"{tmp_path}/meta.parquet: 11 of 21 clips are usable: 8 videos, 3 images"
    assert f"       1 bad: the file is empty, first {files}/empty.mp4" in lines
    assert f"       1 with a variable frame rate, first {files}/variable.mp4" in lines
    assert f"       1 skipped: not named as a video or an image, first {files}/words.nfo" in lines
    assert lines[-1] == f"next: name it in a config, --config.dataset.data_path={tmp_path}/meta.parquet"
    assert "bad=9, ok=12" in bar  # what is absurd is told from what was found


def decoded_alone(path: Path, height: int, width: int) -> np.ndarray:
    """Returns all frames of a file as ffmpeg gives them when it knows nothing but the path."""
    line = [binary(), "-nostdin", "-loglevel", "fatal", "-i", str(path), "-fps_mode", "passthrough"]
    raw = subprocess.run([*line, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], capture_output=True, timeout=60).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)


def test_what_meta_calls_usable_the_loader_reads_as_what_it_is(files, tmp_path):
    """An MP4 named .jpg, a PNG named .mp4, a video of one frame, odd sizes, a rotation, a gap, a missing end."""
    dataset.meta(files, tmp_path / "meta.parquet", 2)
    clips = ClipDataset(str(tmp_path / "meta.parquet"), 60.0, 2, "ffmpeg", cache_bytes=0, max_bad_rate=0.0)
    table = clips.table()
    source, buckets = clips.source(table), clips.buckets({"24px": {4: (1.0, 1), 1: (1.0, 1)}})
    plan, seen = Plan(table, buckets, seed=0, data_shards=1), []
    for batch in make_loader(plan, source, start_step=0, num_steps=len(plan)):
        (row,), (video,) = batch["sample_id"], batch["video"]
        path, height, width = (table[name][row].as_py() for name in ("path", "height", "width"))
        size, (top, left, h, w) = resize_and_crop(height, width, video.shape[1:3], image=len(video) == 1)
        frames = [Image.fromarray(one) for one in decoded_alone(Path(path), height, width)]
        scaled = [np.asarray(one.resize(size[::-1], Image.Resampling.BICUBIC), np.float32) for one in frames]
        expected = np.stack(scaled)[:, top : top + h, left : left + w]
        nearest = np.abs(expected[None] - video[:, None]).mean((2, 3, 4)).min(1)
        assert nearest.max() < 6, path  # colours are interpolated before or after; other frames are 20 apart
        seen.append((Path(path).name, len(video)))
    assert sorted(seen) == sorted((name, 4 if USABLE[name][0] > 1 else 1) for name in USABLE)
    assert source.bad_clips == {}


def test_a_folders_table_is_told_where_it_names_nothing(files, tmp_path, capsys):
    os.link(files / "a.mp4", tmp_path / "a.mp4")
    (tmp_path / "captions.csv").write_text("path,text\na.mp4,one\na.mp4,two\ngone.mp4,x\n")
    (tmp_path / "b.heic").touch()
    dataset.meta(tmp_path, tmp_path / "out" / "meta.parquet", 1)
    assert [row["text"] for row in rows_of(tmp_path / "out" / "meta.parquet").values()] == ["one", "x"]
    assert capsys.readouterr().out.splitlines()[:4] == [
        f"{tmp_path}/out/meta.parquet: 1 of 2 clips are usable: 1 videos, 0 images",
        f"       1 bad: no such file, first {tmp_path}/gone.mp4",
        f"       1 left out: the clip of an earlier row again, first {tmp_path}/a.mp4",
        f"       1 skipped: not named as a video or an image, first {tmp_path}/b.heic",
    ]


def test_a_list_can_name_what_a_folder_would_not_show(files, tmp_path, capsys):
    shutil.copy(files / "a.mp4", tmp_path / "mp4_in.txt")
    rows = [
        ("mp4_in.txt", b"caf\xe9"),
        ("mp4_in.txt", b"again"),
        (f"{files}/c.png", b""),
        (f"{files}/b.mp4", b"nan"),
        (f"{files}/words.nfo", b"text"),
        ("gone.mp4", b"x"),
        ("https://x.org/a.mp4", b"x"),
        ("", b"x"),
    ]
    (tmp_path / "list.csv").write_bytes(b"path,text\n" + b"".join(b"%b,%b\n" % (n.encode(), t) for n, t in rows))
    dataset.meta(tmp_path / "list.csv", tmp_path / "meta.csv", 1)
    table = records.read_table(tmp_path / "meta.csv").select(["text", "status", "reason"]).to_pylist()
    assert [tuple(row.values()) for row in table] == [
        ("caf\N{REPLACEMENT CHARACTER}", "ok", ""),
        ("", "ok", ""),
        ("", "ok", ""),
        ("text", "bad", "text, not a video"),
        ("x", "bad", "no such file"),
        ("x", "bad", "a URL, not a file: download it first"),
        ("x", "bad", "the row has no path"),
    ]
    printed = capsys.readouterr().out
    assert f"       1 left out: the clip of an earlier row again, first {tmp_path}/mp4_in.txt" in printed
    assert f"       2 without a caption, first {files}/c.png" in printed
    assert '       1 bad: the row has no path, first ""' in printed


def test_meta_probes_again_what_a_table_claims(files, tmp_path):
    claims = {"num_frames": [10**9, -1], "height": [-720, 0], "fps": ["fast", "inf"], "score_aes": [4.5, None]}
    paths = [str(files / name) for name in ("a.mp4", "c.png")]
    pq.write_table(pa.table({"path": paths, "text": ["x", None]} | claims), tmp_path / "list.parquet")
    dataset.meta(tmp_path / "list.parquet", tmp_path / "meta.parquet", 1)
    rows = list(rows_of(tmp_path / "meta.parquet").values())
    assert [(row["num_frames"], row["height"], row["text"]) for row in rows] == [(7, 34, "x"), (1, 31, "")]
    assert [row["score_aes"] for row in rows] == [4.5, None]
    np.testing.assert_equal([row["fps"] for row in rows], [8.0, float("nan")])


def test_meta_of_shards_finds_clips_and_captions(files, tmp_path):
    source = write_list(tmp_path / "list.csv", files, ["a.mp4", "c.png", "rotated.mp4"])
    dataset.meta(source, tmp_path / "meta.parquet", 1)
    write_shards(
        records.read_table(tmp_path / "meta.parquet"),
        tmp_path / "shards",
        name="clips",
        shard_bytes=1 << 20,
        num_workers=1,
    )
    dataset.meta(tmp_path / "shards", tmp_path / "again.parquet", 1)
    before, after = (records.read_table(tmp_path / name) for name in ("meta.parquet", "again.parquet"))
    facts = ["text", "num_frames", "height", "width", "fps", "variable_fps", "status"]
    assert repr(after.select(facts).to_pylist()) == repr(before.select(facts).to_pylist())
    assert after["record"].to_pylist() == [0, 1, 2]
    (shard,) = after["shard"].unique().to_pylist()
    assert Path(shard).parent == tmp_path / "shards"
    with pytest.raises(UserError, match="no split 'test', only train"):
        dataset.meta(tmp_path / "shards", tmp_path / "test.parquet", 1, split="test")


def test_a_killed_meta_goes_on_and_leaves_no_process(dataset_command, files, tmp_path):
    """kill -9, which no program can answer; this ffmpeg is slow, and notes each of its calls."""
    for number in range(48):
        os.link(files / "a.mp4", (tmp_path / f"{number:02d}.mp4"))
    slow, calls, table = tmp_path / "ffmpeg", tmp_path / "calls", tmp_path / "out" / "meta.parquet"
    slow.write_text(f'#!/bin/sh\necho >>{calls}\nsleep 0.1\nexec {binary()} "$@"\n')
    slow.chmod(0o755)
    arguments = ["meta", f"--input={tmp_path}", f"--output={table}", "--num_workers=2"]
    line = [sys.executable, "-m", "opensora_jax.dataset", *arguments]
    partial = table.with_name("meta.parquet.partial")
    process = subprocess.Popen(line, cwd=ROOT, env=os.environ | {"FFMPEG_BINARY": str(slow)}, stderr=subprocess.DEVNULL)
    while not (partial.exists() and partial.read_bytes().count(b"\n")):
        assert process.poll() is None
        time.sleep(0.02)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{worker}/cwd").exists() for worker in workers):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.02)
    assert os.listdir(table.parent) == ["meta.parquet.partial"]
    kept = partial.read_bytes().count(b"\n")
    assert 16 <= kept < 48
    calls.unlink()
    assert dataset_command(*arguments, FFMPEG_BINARY=str(slow)).returncode == 0
    assert calls.read_bytes().count(b"\n") == 48 - kept
    assert sorted(os.listdir(table.parent)) == ["meta.parquet", "runs.jsonl"]
    assert records.read_table(table)["num_frames"].to_pylist() == [7] * 48


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.csv", b"", "Cannot read .*list.csv .Empty CSV file"),
        ("list.csv", b"path,text\n", "No clips in .*list.csv"),
        ("list.csv", b"path,caption\na.mp4,x\n", "lacks text: it has path, caption and needs path,text"),
        ("list.csv", b"path,text\na.mp4,x,y\n", "Expected 2 columns, got 3"),
        ("list.parquet", b"PAR1 and no more", "Cannot read .*list.parquet"),
        ("list.json", b"{}", r"it must be a \.csv or \.parquet with path,text"),
        ("folder/notes.md", b"no clip", "No clips in .*folder"),
        ("words.mp4", b"a clip for --input", r"it must be a \.csv or \.parquet with path,text"),
    ],
)
def test_a_bad_source_is_one_error_and_writes_nothing(tmp_path, name, content, message):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    source = tmp_path / Path(name).parts[0]
    with pytest.raises(UserError, match=message) as caught:
        dataset.meta(source, tmp_path / "out" / "meta.parquet", 1)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == [source.name]


def test_the_commands_make_and_describe_the_demo_set(dataset_command, tmp_path):
    data, table = tmp_path / "data", tmp_path / "meta.parquet"
    made = dataset_command("demo", f"--output={data}", "--num_clips=3", "--size=16", "--frames=5")
    assert made.returncode == 0, made.stderr
    described = dataset_command("meta", f"--input={data / 'captions.csv'}", f"--output={table}", "--num_workers=2")
    assert described.returncode == 0, described.stderr
    assert described.stdout.startswith(f"{table}: 3 of 3 clips are usable: 3 videos, 0 images\nnext: ")
    assert records.read_table(table)["num_frames"].to_pylist() == [5, 5, 5]
    assert [json.loads(line)["command"] for line in (data / "runs.jsonl").read_text().splitlines()] == ["dataset demo"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["meta", "--input=/nowhere", "--output=x.parquet"], "No data at /nowhere"),
        (["meta", "--output=x.parquet"], "--input is missing"),
        (["meta", "--input=.", "--output=x.json"], "A table is .parquet or .csv: got x.json"),
        (["meta", "--input=.", "--output=x.csv", "--num_workers=0"], "--num_workers=0"),
        (["meta", "--input=.", "--output=x.csv", "--runner=spark"], "<processes|beam>"),
        (["meta", "--input=.", "--output=x.csv", "--beam_options=-a"], "--beam_options goes with --runner=beam"),
        (["demo", "--output=x", "--crf=3"], "no flag --crf"),
        (["dmo"], "demo"),
    ],
)
def test_a_mistake_is_one_line_and_status_1(dataset_command, arguments, message):
    result = dataset_command(*arguments)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
