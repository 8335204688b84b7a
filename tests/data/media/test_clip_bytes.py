"""Clips that are no files give what files give."""

import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest

from opensora_jax.data.media import clip_bytes
from opensora_jax.data.media.clip_bytes import Stills
from opensora_jax.data.media.ffmpeg_process import binary
from opensora_jax.data.media.video import VideoError, probe, read_frames
from opensora_jax.data.media.video_writer import mux_stills, write_video

FRAMES, LEVELS = 23, 8
KINDS = {  # suffix -> what makes it of 23 numbered frames
    ".mp4": ("-c:v", "libx264"),
    ".mov": ("-c:v", "mjpeg"),
    ".mkv": ("-c:v", "ffv1"),
    ".webm": ("-c:v", "libvpx-vp9"),
    ".avi": ("-c:v", "mpeg4"),
    ".ts": ("-c:v", "libx264"),
    ".flv": ("-c:v", "flv1"),
    ".wmv": ("-c:v", "wmv2"),
    ".gif": (),
    ".png": ("-frames:v", "1"),
    ".jpg": ("-frames:v", "1"),
    ".webp": ("-frames:v", "1"),
    ".bmp": ("-frames:v", "1"),
    ".tif": ("-frames:v", "1"),
    ".ppm": ("-frames:v", "1"),
}


def ffmpeg(*arguments: str) -> None:
    command = [binary(), "-nostdin", "-y", "-loglevel", "error", *arguments]
    subprocess.run(command, check=True, timeout=60, capture_output=True)


def numbers_of(frames: np.ndarray) -> list[int]:
    return np.round(frames.mean((1, 2, 3)) / LEVELS).astype(int).tolist()


@pytest.fixture(scope="module")
def numbered(tmp_path_factory) -> Path:
    levels = np.arange(FRAMES, dtype=np.uint8)[:, None, None, None] * LEVELS
    frames = np.broadcast_to(levels, (FRAMES, 34, 46, 3)).copy()
    return write_video(tmp_path_factory.mktemp("numbered") / "clip.mp4", frames, 25)


def stills_of(path: Path, suffix: str, folder: Path) -> Stills:
    ffmpeg("-i", str(path), "-q:v", "2", str(folder / f"%03d{suffix}"))
    return Stills(file.read_bytes() for file in sorted(folder.glob(f"*{suffix}")))


@pytest.mark.parametrize("suffix", KINDS)
def test_bytes_give_what_the_file_gives(suffix, numbered, tmp_path):
    path = tmp_path / f"clip{suffix}"
    ffmpeg("-i", str(numbered), *KINDS[suffix], str(path))
    info = probe(path)
    assert repr(probe(path.read_bytes())) == repr(info)  # NaN is no NaN
    assert (info.height, info.width) == (34, 46)
    picks = np.arange(0, info.num_frames, 5)
    np.testing.assert_array_equal(
        read_frames(path.read_bytes(), info, picks=picks), read_frames(path, info, picks=picks)
    )


@pytest.mark.parametrize(("content", "reason"), [(b"", "the file is empty"), (b"just some words\n" * 9, "ffmpeg: .+")])
def test_bytes_that_are_no_video_have_a_reason(content, reason):
    with pytest.raises(VideoError, match=f"^{reason}$"):
        probe(content)


def test_bytes_leave_nothing_open(numbered):
    data, before = numbered.read_bytes(), len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        probe(data)
    assert len(os.listdir("/proc/self/fd")) == before


def test_without_files_in_memory_a_temporary_file_serves(numbered, tmp_path, monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert probe(numbered.read_bytes()) == probe(numbered)
    with clip_bytes.as_file(b"abc") as path:
        assert Path(path).parent == tmp_path
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_stills_are_frames_of_the_rate_that_is_given(suffix, numbered, tmp_path):
    stills = stills_of(numbered, suffix, tmp_path)
    info = probe(stills, fps=7.5)
    assert (info.num_frames, info.height, info.width, info.fps) == (FRAMES, 34, 46, 7.5)
    for picks in ([0], [0, 1, 2], [5, 7, 22], [22]):
        assert numbers_of(read_frames(stills, info, picks=np.array(picks))) == picks


def test_stills_without_a_rate_or_frames_are_refused(numbered, tmp_path):
    stills = stills_of(numbered, ".png", tmp_path)
    with pytest.raises(VideoError, match="--fps"):
        probe(stills)
    with pytest.raises(VideoError, match="no frames"):
        probe(Stills(), fps=8)
    info = probe(stills, fps=8)
    with pytest.raises(VideoError, match="2 frames wanted from frame 0, 1 decoded"):
        read_frames(Stills(stills[:19]), info, picks=np.array([7, 19]))


def test_one_still_is_an_image(numbered, tmp_path):
    info = probe(Stills(stills_of(numbered, ".png", tmp_path)[:1]))
    assert info.num_frames == 1
    assert np.isnan(info.fps)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("fps", [8, 23.976])
def test_muxed_stills_are_a_video_that_can_be_read_from_any_frame(suffix, fps, numbered, tmp_path):
    data = mux_stills(stills_of(numbered, suffix, tmp_path), fps)
    info = probe(data)
    assert (info.num_frames, info.variable_fps) == (FRAMES, False)
    assert info.fps == pytest.approx(fps, rel=1e-3)
    for start in (0, 1, 7, 21):
        picks = np.arange(start, FRAMES, 2)
        assert numbers_of(read_frames(data, info, picks=picks)) == picks.tolist()
