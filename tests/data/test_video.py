import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from opensora_jax.config.errors import UserError
from opensora_jax.data import video
from opensora_jax.data.video import VideoError, VideoInfo, probe, read_frames, write_gif, write_video

FRAMES = 31
LEVELS = 8  # brightness per frame: what a decoded frame shows tells its number


def numbered(num_frames: int = FRAMES, height: int = 34, width: int = 46) -> np.ndarray:
    numbers = np.arange(num_frames, dtype=np.uint8)[:, None, None, None] * LEVELS
    return np.broadcast_to(numbers, (num_frames, height, width, 3)).copy()


def pattern(height: int, width: int, num_frames: int = 3) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    image = np.stack([255 * x / width, 255 * y / height, 40 + 0 * x], -1).astype(np.uint8)
    return np.repeat(image[None], num_frames, 0)


def ffmpeg(*arguments: str) -> None:
    command = [video.binary(), "-nostdin", "-y", "-loglevel", "error", *arguments]
    subprocess.run(command, check=True, timeout=60, capture_output=True)


def whole(path: Path, info: VideoInfo, start: int = 0, count: int | None = None, stride: int = 1) -> np.ndarray:
    count = info.num_frames if count is None else count
    size = (info.height, info.width)
    return read_frames(path, info, start=start, count=count, stride=stride, size=size, crop=(0, 0, *size))


def numbers_of(frames: np.ndarray) -> list[int]:
    return np.round(frames.mean((1, 2, 3)) / LEVELS).astype(int).tolist()


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", numbered(), 30000 / 1001)


def test_probing_finds_what_was_written(clip):
    info = probe(clip)
    assert (info.num_frames, info.height, info.width, info.rotation) == (FRAMES, 34, 46, 0)
    assert info.fps == pytest.approx(30000 / 1001, rel=1e-5)
    assert not info.variable_fps


@pytest.mark.parametrize(
    ("start", "count", "stride"), [(0, 31, 1), (0, 11, 3), (1, 7, 2), (13, 5, 3), (17, 2, 13), (30, 1, 1)]
)
def test_exactly_the_asked_frames_are_read(clip, start, count, stride):
    frames = whole(clip, probe(clip), start, count, stride)
    assert numbers_of(frames) == list(range(start, start + count * stride, stride))


def test_frames_beyond_the_end_are_refused(clip):
    with pytest.raises(VideoError, match=r"frames 29 to 31 wanted, the file has 31"):
        whole(clip, probe(clip), 29, 2, 2)


def test_a_file_shorter_than_its_table_row_is_refused(clip):
    info = probe(clip)
    claimed = VideoInfo(info.num_frames + 11, info.height, info.width, info.fps)
    with pytest.raises(VideoError, match=r"13 frames wanted from frame 29, 2 decoded"):
        whole(clip, claimed, 29, 13)


def test_a_picture_that_starts_later_than_the_sound_keeps_its_last_frames(tmp_path):
    write_video(tmp_path / "picture.mp4", numbered(11), 5)
    sound = ["-f", "lavfi", "-i", "sine=duration=6"]
    late = ["-itsoffset", "2", "-i", str(tmp_path / "picture.mp4")]
    ffmpeg(*sound, *late, "-c:v", "copy", "-c:a", "aac", str(tmp_path / "late.mkv"))
    info = probe(tmp_path / "late.mkv")
    assert numbers_of(whole(tmp_path / "late.mkv", info)) == list(range(11))


def test_a_variable_rate_is_seen_and_read_on_a_uniform_grid(tmp_path, clip):
    path = tmp_path / "variable.mkv"
    slower = "setpts='if(lt(N,13),N,13+3*(N-13))/10/TB'"  # 10 frames per second, then a third of that
    ffmpeg("-i", str(clip), "-vf", slower, "-fps_mode", "vfr", "-enc_time_base", "1/1000", str(path))
    info = probe(path)
    assert info.variable_fps
    assert info.num_frames == FRAMES
    times = np.where(np.arange(FRAMES) < 13, np.arange(FRAMES), 13 + 3 * (np.arange(FRAMES) - 13)) / 10
    assert info.fps == pytest.approx((FRAMES - 1) / times[-1], rel=1e-3)
    for start, count, stride in [(0, 31, 1), (0, 7, 5), (3, 5, 2), (17, 5, 3)]:
        seen = np.array(numbers_of(whole(path, info, start, count, stride)))
        wanted = (start + stride * np.arange(count)) / info.fps
        nearest = np.abs(times[:, None] - wanted).min(0)
        assert np.abs(times[seen] - wanted) == pytest.approx(nearest, abs=0.5 / info.fps)


def test_rotation_is_in_the_size_and_in_the_pixels(tmp_path):
    upright = write_video(tmp_path / "upright.mp4", pattern(34, 46), 8)
    ffmpeg("-display_rotation", "90", "-i", str(upright), "-c", "copy", str(tmp_path / "rotated.mp4"))
    info = probe(tmp_path / "rotated.mp4")
    assert (info.height, info.width, info.rotation) == (46, 34, 90)
    turned = np.rot90(whole(upright, probe(upright)), axes=(1, 2))  # counter-clockwise
    difference = np.abs(whole(tmp_path / "rotated.mp4", info).astype(int) - turned)
    assert difference.mean() < 1  # colours are interpolated after the turn


def test_frames_are_scaled_then_cut(tmp_path):
    path = write_video(tmp_path / "clip.mp4", pattern(62, 94), 8)
    frames = read_frames(path, probe(path), start=0, count=2, stride=1, size=(31, 47), crop=(5, 7, 19, 23))
    expected = pattern(31, 47, 2)[:, 5:24, 7:30]
    assert frames.shape == (2, 19, 23, 3)
    assert np.abs(frames.astype(int) - expected)[..., :2].mean() < 4


def test_odd_sizes_are_read(tmp_path):
    path = tmp_path / "odd.mkv"
    ffmpeg("-f", "lavfi", "-i", "testsrc=s=47x31:r=7:d=1", "-c:v", "ffv1", str(path))
    info = probe(path)
    assert (info.num_frames, info.height, info.width) == (7, 31, 47)
    assert whole(path, info).shape == (7, 31, 47, 3)


def test_an_image_is_a_video_of_one_frame(tmp_path):
    path = write_video(tmp_path / "still.mp4", pattern(31, 47, 1), 8)
    info = probe(path)
    assert path.name == "still.png"
    assert (info.num_frames, info.height, info.width) == (1, 31, 47)
    assert np.isnan(info.fps)
    np.testing.assert_array_equal(whole(path, info), pattern(31, 47, 1))


def test_written_video_looks_like_the_frames(tmp_path):
    path = write_video(tmp_path / "clip.mp4", pattern(48, 64, 5), 8)
    error = whole(path, probe(path)).astype(float) - pattern(48, 64, 5)
    assert 10 * np.log10(255**2 / (error**2).mean()) > 35


def test_the_same_frames_give_the_same_bytes(tmp_path):
    first, second = (write_video(tmp_path / name, numbered(5), 8) for name in ("a.mp4", "b.mp4"))
    assert first.read_bytes() == second.read_bytes()


def test_odd_sizes_are_not_written(tmp_path):
    with pytest.raises(VideoError, match=r"even height and width: got 31x46"):
        write_video(tmp_path / "odd.mp4", numbered(3, 31, 46), 8)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_an_os_error_and_leaves_nothing(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        write_video(tmp_path / "file" / "clip.mp4", numbered(3), 8)
    with pytest.raises(FileNotFoundError):
        write_video(tmp_path / "nowhere" / "clip.mp4", numbered(3), 8)


def test_a_full_disk_is_an_os_error(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "_run", lambda *_: (1, b"", "[error] No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        write_video(tmp_path / "clip.mp4", numbered(3), 8)
    assert list(tmp_path.iterdir()) == []


def test_a_gif_holds_all_frames(tmp_path):
    data = write_gif(tmp_path / "clip.gif", numbered(5), 8)
    assert (tmp_path / "clip.gif").read_bytes() == data
    assert data.startswith(b"GIF89a")
    assert probe(tmp_path / "clip.gif").num_frames == 5
    assert write_gif(None, numbered(5), 8) == data


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "no such file"), (b"", "the file is empty"), (b"just some words\n" * 9, "ffmpeg: .+")],
)
def test_what_is_no_video_has_a_reason(tmp_path, content, reason):
    path = tmp_path / "clip.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(VideoError, match=f"^{reason}$"):
        probe(path)


def test_a_folder_and_a_url_are_no_video(tmp_path):
    with pytest.raises(VideoError, match=r"^not a file$"):
        probe(tmp_path)
    with pytest.raises(VideoError, match="download it first"):
        probe("https://example.org/clip.mp4")


def test_sound_alone_is_no_video(tmp_path):
    ffmpeg("-f", "lavfi", "-i", "sine=duration=0.2", str(tmp_path / "sound.mp4"))
    with pytest.raises(VideoError, match="no video stream"):
        probe(tmp_path / "sound.mp4")


def test_a_file_that_lost_its_index_is_refused(tmp_path, clip):
    ffmpeg("-i", str(clip), "-c", "copy", str(tmp_path / "index_last.mp4"))
    data = (tmp_path / "index_last.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    with pytest.raises(VideoError, match="moov atom not found"):
        probe(tmp_path / "cut.mp4")


def test_a_file_that_lost_its_end_counts_what_is_left(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (23, 34, 46, 3), np.uint8)
    data = write_video(tmp_path / "whole.mp4", noise, 8).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 2 // 3])
    info = probe(tmp_path / "cut.mp4")
    assert 11 < info.num_frames < 19
    assert whole(tmp_path / "cut.mp4", info, 0, 7).shape == (7, 34, 46, 3)


def test_damage_among_the_frames_is_refused_not_concealed(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (23, 34, 46, 3), np.uint8)
    data = bytearray(write_video(tmp_path / "whole.mp4", noise, 8).read_bytes())
    middle = slice(len(data) // 2, len(data) // 2 + 3000)
    data[middle] = bytes(byte ^ 0x5A for byte in data[middle])
    (tmp_path / "damaged.mp4").write_bytes(data)
    info = probe(tmp_path / "damaged.mp4")
    assert info.num_frames == 23
    with pytest.raises(VideoError, match=r"ffmpeg: |decoded"):
        whole(tmp_path / "damaged.mp4", info)


def test_a_process_that_hangs_is_ended(clip, monkeypatch):
    monkeypatch.setattr(video, "TIMEOUT_SECONDS", 0.0)
    with pytest.raises(VideoError, match="longer than"):
        probe(clip)


def test_names_are_never_options_or_protocols(tmp_path, clip, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("-i.mp4", "concat:a.mp4", "50%d, 'quoted' [x].mp4"):
        Path(name).write_bytes(clip.read_bytes())
        assert probe(name).num_frames == FRAMES
        assert numbers_of(whole(Path(name), probe(name), 3, 2)) == [3, 4]


def test_a_wrong_binary_is_the_users_mistake(monkeypatch):
    monkeypatch.setenv("FFMPEG_BINARY", os.devnull)
    with pytest.raises(UserError, match="FFMPEG_BINARY"):
        video.binary()
