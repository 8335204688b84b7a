import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from opensora_jax import dataset
from opensora_jax.config.errors import UserError
from opensora_jax.data import records, video
from opensora_jax.data.video import write_video

ROOT = Path(__file__).parents[1]


def command(*arguments: str) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "opensora_jax.dataset", *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture
def mixed(tmp_path) -> Path:
    """Real videos of several sizes and rates, one rotated, and three files that are none."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name, shape, fps in (
        ("a.mp4", (7, 34, 46), 8),
        ("b.mp4", (5, 62, 38), 29.97),
        ("c.png", (1, 31, 47), 8),
    ):
        write_video(folder / name, np.full((*shape, 3), 77, np.uint8), fps)
    turn = [
        video.binary(),
        "-nostdin",
        "-loglevel",
        "error",
        "-display_rotation",
        "90",
        "-i",
        str(folder / "a.mp4"),
    ]
    subprocess.run([*turn, "-c", "copy", str(folder / "rotated.mp4")], check=True, timeout=60)
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("no video at all")
    (folder / "cut.mp4").write_bytes((folder / "a.mp4").read_bytes()[:700])
    return folder


def test_meta_tells_good_files_from_bad_ones(mixed, tmp_path, capsys):
    dataset.meta(mixed, tmp_path / "meta.parquet", 2)
    rows = {Path(r["path"]).name: r for r in records.read_table(tmp_path / "meta.parquet").to_pylist()}
    sizes = {name: (r["num_frames"], r["height"], r["width"]) for name, r in rows.items() if r["status"] == "ok"}
    assert sizes == {
        "a.mp4": (7, 34, 46),
        "b.mp4": (5, 62, 38),
        "c.png": (1, 31, 47),
        "rotated.mp4": (7, 46, 34),
    }
    assert rows["b.mp4"]["fps"] == pytest.approx(29.97)
    assert rows["empty.mp4"]["reason"] == "the file is empty"
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "4 ok, 3 bad" in printed
    assert "empty.mp4: the file is empty" in printed


def test_meta_probes_only_what_changed_but_takes_new_captions(mixed, tmp_path, monkeypatch):
    output = tmp_path / "meta.parquet"
    dataset.meta(mixed, output, 2)
    (mixed / "a.txt").write_text("a new caption")
    write_video(mixed / "b.mp4", np.zeros((3, 62, 38, 3), np.uint8), 8)
    probed = []
    monkeypatch.setattr(records, "probe", lambda path: probed.append(Path(path).name) or video.probe(path))
    dataset.meta(mixed, output, 1)
    assert sorted(probed) == ["b.mp4", "cut.mp4", "empty.mp4", "text.mp4"]
    rows = {Path(r["path"]).name: r for r in records.read_table(output).to_pylist()}
    assert rows["a.mp4"]["text"] == "a new caption"
    assert rows["b.mp4"]["num_frames"] == 3


def test_meta_of_bad_files_only_writes_nothing(tmp_path):
    (tmp_path / "text.mp4").write_text("no video at all")
    with pytest.raises(UserError, match=r"None of the 1 files .*text\.mp4: ffmpeg: "):
        dataset.meta(tmp_path, tmp_path / "meta.parquet", 1)
    assert os.listdir(tmp_path) == ["text.mp4"]


def test_the_commands_make_and_describe_the_demo_set(tmp_path):
    data, table = tmp_path / "data", tmp_path / "meta.parquet"
    made = command("demo", f"--output={data}", "--num_clips=3", "--size=16", "--frames=5")
    assert made.returncode == 0, made.stderr
    described = command("meta", f"--input={data / 'captions.csv'}", f"--output={table}", "--num_workers=2")
    assert described.returncode == 0, described.stderr
    assert described.stdout == f"{table}: 3 ok, 0 bad\n"
    assert records.read_table(table)["num_frames"].to_pylist() == [5, 5, 5]
    assert [json.loads(line)["command"] for line in (data / "runs.jsonl").read_text().splitlines()] == ["dataset demo"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["meta", "--input=/nowhere", "--output=x.parquet"], "No data at /nowhere"),
        (["meta", "--output=x.parquet"], "--input is missing"),
        (["demo", "--output=x", "--crf=3"], "no flag --crf"),
        (["dmo"], "demo"),
    ],
)
def test_a_mistake_is_one_line_and_status_1(arguments, message):
    result = command(*arguments)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
