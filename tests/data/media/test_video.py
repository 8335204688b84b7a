import os
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opensora_jax.config.errors import UserError
from opensora_jax.data.media import ffmpeg_process, video, video_writer
from opensora_jax.data.media.ffmpeg_process import binary
from opensora_jax.data.media.transforms import frame_picks, resize_and_crop
from opensora_jax.data.media.video import VideoError, VideoInfo, probe, read_frames
from opensora_jax.data.media.video_writer import write_gif, write_video

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
    command = [binary(), "-nostdin", "-y", "-loglevel", "error", *arguments]
    subprocess.run(command, check=True, timeout=60, capture_output=True)


def whole(path: Path, info: VideoInfo, start: int = 0, count: int | None = None, stride: int = 1) -> np.ndarray:
    count = info.num_frames if count is None else count
    return read_frames(path, info, picks=start + stride * np.arange(count))


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


@pytest.mark.parametrize("name", ["clip.mkv", "clip.flv", "remuxed.mp4"])
@pytest.mark.parametrize("rate", ["24", "48", "24000/1001", "30000/1001"])
def test_a_rate_of_times_in_whole_milliseconds_is_the_one_that_was_meant(tmp_path, name, rate):
    source = tmp_path / name.replace("remuxed.mp4", "clip.mkv")
    ffmpeg("-f", "lavfi", "-i", f"color=red:size=46x34:rate={rate}", "-frames:v", "51", str(source))
    if source.name != name:
        ffmpeg("-i", str(source), "-c", "copy", str(tmp_path / name))
    info = probe(tmp_path / name)
    assert (info.num_frames, info.fps, info.variable_fps) == (51, float(Fraction(rate)), False)


@pytest.mark.parametrize(
    ("name", "rate", "found"),
    [
        ("clip.mp4", "29.5", 29.5),
        ("clip.avi", "25/2", 12.5),
        ("clip.gif", "100/3", 100 / 3),
        ("clip.gif", "50/3", 50 / 3),
    ],
)
def test_a_rate_that_is_exact_stays_as_it_is(tmp_path, name, rate, found):
    ffmpeg("-f", "lavfi", "-i", f"testsrc=size=46x34:rate={rate}", "-frames:v", "5", str(tmp_path / name))
    assert probe(tmp_path / name).fps == pytest.approx(found, rel=1e-12)


@pytest.mark.parametrize("rate", [23.9, 24.05, 14.5, 0.37])
def test_a_rate_that_rounded_times_cannot_mean_is_their_average(rate):
    ticks = np.round(np.arange(101) / rate * 1000).astype(np.int64)
    assert video._rate(ticks, Fraction(1, 1000)) == pytest.approx(rate, rel=1e-3)
    assert video._rate(ticks, Fraction(1, 1000)) == 100 / (ticks[-1] / 1000)


@pytest.mark.parametrize(
    ("start", "count", "stride"), [(0, 31, 1), (0, 11, 3), (1, 7, 2), (13, 5, 3), (17, 2, 13), (30, 1, 1)]
)
def test_exactly_the_asked_frames_are_read(clip, start, count, stride):
    frames = whole(clip, probe(clip), start, count, stride)
    assert numbers_of(frames) == list(range(start, start + count * stride, stride))


@pytest.mark.parametrize(("interval", "drift"), [(2, 1), (3, 2)])
@pytest.mark.parametrize("count", [5, 7, 10])
@pytest.mark.parametrize("start", [0, 1])
def test_the_frames_of_a_clip_drift_as_the_originals_do(clip, start, count, interval, drift):
    picks = frame_picks(start, count, interval, FRAMES)
    assert numbers_of(read_frames(clip, probe(clip), picks=picks)) == picks.tolist()
    assert picks[-1] - (start + interval * (count - 1)) == drift  # what an even stride would not show


def test_any_ascending_frames_are_read(clip):
    rng = np.random.default_rng(7)
    for count in (1, 2, 5, 13, 23):
        picks = np.sort(rng.choice(FRAMES, count, replace=False))
        assert numbers_of(read_frames(clip, probe(clip), picks=picks)) == picks.tolist()


def test_decoding_ends_with_the_last_pick(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (23, 34, 46, 3), np.uint8)
    data = bytearray(write_video(tmp_path / "whole.mp4", noise, 8).read_bytes())
    data[len(data) * 3 // 4 :] = bytes(len(data) - len(data) * 3 // 4)
    (tmp_path / "damaged.mp4").write_bytes(data)
    info = probe(tmp_path / "damaged.mp4")
    picks = np.array([0, 2, 5, 7])
    assert len(read_frames(tmp_path / "damaged.mp4", info, picks=picks)) == 4
    with pytest.raises(VideoError):
        read_frames(tmp_path / "damaged.mp4", info, picks=np.append(picks, 22))


@pytest.mark.parametrize("rate", [2, 24])
def test_frames_shown_before_their_key_frame_are_found(tmp_path, clip, rate):
    path = tmp_path / "open.mp4"  # open groups of pictures, usual in HEVC: a seek finds the key frame too late
    groups = ["-g", "5", "-x264-params", "open-gop=1:bframes=5:b-pyramid=normal:b-adapt=0"]
    ffmpeg("-i", str(clip), "-vf", f"setpts=N/{rate}/TB", "-r", str(rate), *groups, str(path))
    info = probe(path)
    for start in range(FRAMES - 5):
        picks = frame_picks(start, 3, 2, FRAMES)
        assert numbers_of(read_frames(path, info, picks=picks)) == picks.tolist()


@pytest.mark.parametrize("picks", [[], [-1, 3], [3, 3], [5, 2]])
def test_numbers_that_do_not_ascend_are_refused(clip, picks):
    with pytest.raises(ValueError, match="ascend from 0 on"):
        read_frames(clip, probe(clip), picks=np.array(picks, np.int64))


@pytest.mark.parametrize("rate", ["24000/1001", "30000/1001", "60000/1001", "23.976"])
def test_files_that_count_time_in_frames_give_the_right_ones(tmp_path, clip, rate):
    path = tmp_path / "clip.avi"
    ffmpeg("-r", rate, "-i", str(clip), "-c:v", "mpeg4", "-q:v", "2", str(path))
    info = probe(path)
    for start in (1, 2, 3, 7, 13, 29):
        assert numbers_of(whole(path, info, start, 2)) == [start, start + 1]


@pytest.mark.parametrize(("name", "codec"), [("clip.mpg", "mpeg1video"), ("clip.avi", "libx264")])
def test_files_whose_frames_lack_times_are_refused(tmp_path, clip, name, codec):
    ffmpeg("-r", "25", "-i", str(clip), "-c:v", codec, str(tmp_path / name))
    with pytest.raises(VideoError, match="not all frames carry times: convert the file"):
        probe(tmp_path / name)


def test_frames_beyond_the_end_are_refused(clip):
    with pytest.raises(VideoError, match=r"frames 29 to 31 wanted, the file has 31"):
        whole(clip, probe(clip), 29, 2, 2)


def test_a_file_shorter_than_its_table_row_is_refused(clip):
    info = probe(clip)
    claimed = VideoInfo(info.num_frames + 11, info.height, info.width, info.fps)
    with pytest.raises(VideoError, match=r"13 frames wanted from frame 29, 2 decoded"):
        whole(clip, claimed, 29, 13)


def decoded_alone(path: Path, height: int = 34, width: int = 46) -> np.ndarray:
    """Returns all frames of a file, by one run of ffmpeg from its beginning."""
    line = [binary(), "-nostdin", "-loglevel", "error", "-i", str(path), "-map", "0:V:0", "-fps_mode", "passthrough"]
    scale = ["-vf", "scale=flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp,format=rgb24"]
    raw = subprocess.run([*line, *scale, "-f", "rawvideo", "-"], check=True, capture_output=True, timeout=60).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)


@pytest.mark.parametrize("variable", [False, True])
@pytest.mark.parametrize(("name", "seconds"), [("late.mkv", 2), ("late.mp4", 1), ("late.mkv", 0.021), ("late.ts", 1)])
def test_frames_count_from_the_start_of_the_picture_where_sound_comes_first(tmp_path, name, seconds, variable):
    write_video(tmp_path / "picture.mp4", numbered(), 24)
    path, sound = tmp_path / name, ["-f", "lavfi", "-i", "sine=duration=6"]
    late = ["-itsoffset", str(seconds), "-i", str(tmp_path / "picture.mp4")]
    code = ["-c:v", "libx264", "-g", "7", "-fps_mode", "passthrough", "-enc_time_base", "1/90000", "-c:a", "aac"]
    pace = ["-vf", "setpts=PTS+0.02/TB*mod(N\\,2)"] if variable else []
    ffmpeg(*sound, *late, "-map", "0:a", "-map", "1:v", *pace, *code, str(path))
    info, alone = probe(path), decoded_alone(path)
    assert (info.variable_fps, numbers_of(alone)) == (variable, list(range(FRAMES)))
    times = (np.arange(FRAMES) / 24 + 0.02 * (np.arange(FRAMES) % 2)) if variable else np.arange(FRAMES) / 24
    newest = [np.flatnonzero(times <= (n + 0.5) / info.fps + 1e-3).max() for n in range(FRAMES)]
    for start in (0, 1, 3, 13, 25):
        picks = start + np.arange(3)
        np.testing.assert_array_equal(whole(path, info, start, 3), alone[np.array(newest)[picks]])


@pytest.mark.parametrize("variable", [False, True])
def test_files_without_an_index_are_read_however_far_their_key_frames_are_apart(tmp_path, variable):
    count, path = 601, tmp_path / "clip.ts"
    bits = np.arange(count)[:, None] >> np.arange(10) & 1  # ten stripes tell the number of a frame
    frames = np.repeat(bits.astype(np.uint8) * 255, 8, axis=1)[:, None, :, None]
    write_video(tmp_path / "clip.mp4", np.broadcast_to(frames, (count, 16, 80, 3)).copy(), 25)
    pace = ["-vf", "setpts=PTS+0.015/TB*gt(mod(N\\,50)\\,25)"] if variable else []
    code = ["-c:v", "libx264", "-g", "250", "-sc_threshold", "0", "-fps_mode", "passthrough"]
    ffmpeg("-i", str(tmp_path / "clip.mp4"), *pace, *code, "-enc_time_base", "1/90000", str(path))
    info = probe(path)
    assert (info.num_frames, info.variable_fps) == (count, variable)
    for start in (1, 20, 130, 249, 250, 251, 400, 598):
        read = whole(path, info, start, 3)[:, :, 4::8].mean((1, 3)) > 127
        assert (read @ (1 << np.arange(10))).tolist() == [start, start + 1, start + 2], start


RATES = {  # expression of ffmpeg: the same in Python
    "if(lt(N,13),N,13+3.1*(N-13))": lambda n: np.where(n < 13, n, 13 + 3.1 * (n - 13)),
    "N+0.4*sin(N*N)": lambda n: n + 0.4 * np.sin(n * n),
    "N+3.1*gt(N,7)+4.3*gt(N,20)": lambda n: n + 3.1 * (n > 7) + 4.3 * (n > 20),  # as recordings of screens
}


@pytest.mark.parametrize("expression", RATES)
@pytest.mark.parametrize("key_frames", ["5", "250"])
def test_a_variable_rate_is_seen_and_read_on_a_uniform_grid(tmp_path, clip, expression, key_frames):
    path = tmp_path / "variable.mkv"
    code = ["-fps_mode", "vfr", "-g", key_frames, "-bf", "2", "-enc_time_base", "1/10000"]
    ffmpeg("-i", str(clip), "-vf", f"setpts='({expression})/10/TB'", *code, str(path))
    info = probe(path)
    times = RATES[expression](np.arange(FRAMES)) / 10
    assert info.variable_fps
    assert info.num_frames == FRAMES
    assert info.fps == pytest.approx((FRAMES - 1) / times[-1], rel=1e-3)
    newest = np.array([np.flatnonzero(times <= (n + 0.5) / info.fps).max() for n in range(FRAMES)])
    for picks in [frame_picks(2, 7, 3, FRAMES), frame_picks(11, 9, 2, FRAMES), np.array([1, 2, 5, 17, 30])]:
        assert numbers_of(read_frames(path, info, picks=picks)) == newest[picks].tolist()
    for start in range(0, FRAMES, 5):
        assert numbers_of(whole(path, info, start, FRAMES - start)) == newest[start:].tolist()


def test_rotation_is_in_the_size_and_in_the_pixels(tmp_path):
    upright = write_video(tmp_path / "upright.mp4", pattern(34, 46), 8)
    ffmpeg("-display_rotation", "90", "-i", str(upright), "-c", "copy", str(tmp_path / "rotated.mp4"))
    info = probe(tmp_path / "rotated.mp4")
    assert (info.height, info.width, info.rotation) == (46, 34, 90)
    turned = np.rot90(whole(upright, probe(upright)), axes=(1, 2))  # counter-clockwise
    difference = np.abs(whole(tmp_path / "rotated.mp4", info).astype(int) - turned)
    assert difference.mean() < 1  # colours are interpolated after the turn


@pytest.mark.parametrize("degrees", ["90", "180", "270"])
def test_the_picks_of_a_rotated_file_are_scaled_and_cut_upright(tmp_path, degrees):
    upright = write_video(tmp_path / "upright.mp4", numbered(), 8)
    ffmpeg("-display_rotation", degrees, "-i", str(upright), "-c", "copy", str(tmp_path / "rotated.mp4"))
    info = probe(tmp_path / "rotated.mp4")
    picks = frame_picks(1, 7, 3, FRAMES)
    scaled, crop = resize_and_crop(info.height, info.width, (23, 29))
    frames = read_frames(tmp_path / "rotated.mp4", info, picks=picks, size=scaled, crop=crop)
    assert frames.shape == (7, 23, 29, 3)
    assert numbers_of(frames) == picks.tolist()


def test_a_photograph_lies_as_its_exif_says(tmp_path):
    picture = Image.fromarray(pattern(34, 46)[0])
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    picture.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    info = probe(tmp_path / "photo.jpg")
    assert (info.num_frames, info.height, info.width) == (1, 46, 34)
    turned = np.rot90(pattern(34, 46)[0], -1)
    assert np.abs(whole(tmp_path / "photo.jpg", info)[0].astype(int) - turned).mean() < 4


@pytest.mark.parametrize("name", ["photo.jpg", "clip.mp4", "https://x.org/photo.jpg"])
@pytest.mark.parametrize("count", [1, 9])
def test_a_file_that_is_gone_is_bad_like_any_other(tmp_path, name, count):
    path = name if "://" in name else tmp_path / name
    reason = "a URL, not a file: download it first" if "://" in name else "no such file"
    with pytest.raises(VideoError, match=f"^{reason}$"):
        read_frames(path, VideoInfo(count, 31, 47, np.nan if count == 1 else 8.0), picks=np.arange(count))


def test_a_file_that_goes_while_it_is_read_is_bad_too(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "check_file", lambda clip: None)
    with pytest.raises(VideoError, match="cannot be opened: No such file or directory"):
        read_frames(tmp_path / "photo.jpg", VideoInfo(1, 31, 47, np.nan), picks=np.array([0]))


def test_a_file_that_cannot_be_looked_up_is_not_told_as_missing(tmp_path):
    (tmp_path / "clip.mp4").symlink_to(tmp_path / "clip.mp4")
    with pytest.raises(VideoError, match=r"^cannot be opened: Too many levels of symbolic links$"):
        probe(tmp_path / "clip.mp4")


@pytest.mark.parametrize("name", ["a%d.png", "a%03d.png", "a%*.png", "a[1].png", "%d/a.png", "a%%.png"])
def test_the_name_of_an_image_is_no_pattern(tmp_path, name):
    """ffmpeg takes `a%d.png` for all of a0.png, a1.png, ... and would read the first one that is there."""
    path = tmp_path / name
    for level, one in enumerate([path, *(tmp_path / other for other in ("a1.png", "a001.png", "1/a.png", "a%.png"))]):
        one.parent.mkdir(exist_ok=True)
        Image.new("RGB", (46, 34), (50 * level + 7,) * 3).save(one)
    info = probe(path)
    assert (info.num_frames, info.height, info.width) == (1, 34, 46)
    assert (read_frames(path, info, picks=np.array([0])) == 7).all()


def test_half_an_image_is_refused(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (31, 47, 3), np.uint8))
    noise.save(tmp_path / "photo.jpg")
    data = (tmp_path / "photo.jpg").read_bytes()
    (tmp_path / "photo.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(VideoError, match="ffmpeg: "):
        probe(tmp_path / "photo.jpg")
    with pytest.raises(VideoError, match="ffmpeg: "):
        read_frames(tmp_path / "photo.jpg", VideoInfo(1, 31, 47, np.nan), picks=np.array([0]))


@pytest.mark.parametrize("size", [(46, 34), (34, 4600)])
def test_frames_of_another_shape_than_the_row_says_are_refused(clip, size):
    claimed = VideoInfo(FRAMES, *size, 30000 / 1001)
    with pytest.raises(VideoError, match=rf"not the shape {size[0]}x{size[1]} of its row: probe it again"):
        read_frames(clip, claimed, picks=np.arange(3), size=(17, 23), crop=(0, 0, 17, 23))


def test_frames_are_scaled_then_cut(tmp_path):
    path = write_video(tmp_path / "clip.mp4", pattern(62, 94), 8)
    frames = read_frames(path, probe(path), picks=np.arange(2), size=(31, 47), crop=(5, 7, 19, 23))
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
    monkeypatch.setattr(video_writer, "run", lambda *_: (1, b"", "[error] No space left on device"))
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
    monkeypatch.setattr(ffmpeg_process, "TIMEOUT_SECONDS", 0.0)
    with pytest.raises(VideoError, match=r"ffmpeg took longer than 0\.0 s, 2 times"):
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
        binary()
