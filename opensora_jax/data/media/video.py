"""Probe and decode video through ffmpeg processes: any codec works and no library holds the GIL.

ffprobe is not needed: the `framecrc` muxer lists every packet of a stream without decoding it.
"""

import math
import os
import re
import stat
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from opensora_jax.data.media.clip_bytes import Clip, Stills, as_file
from opensora_jax.data.media.ffmpeg_process import VideoError, reason, run, source

SCALE_FLAGS = "bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"  # bicubic widens when shrinking: antialiased
PILLOWS_KERNEL = {"param0": 0, "param1": 0.5}  # of the bicubic family; ffmpeg's own choice sharpens more
JITTER_FRAMES = 0.25  # a frame further than this from the uniform grid makes a file variable-rate
MILLISECOND = 1e-3  # what many containers round times to
SHAPE_SLACK = 0.1  # of the aspect ratio: containers can cut some pixels off, a missed rotation is further away
WRONG_SHAPE = "Invalid too big or non positive size"  # ffmpeg's words when its crop filter is given -1
SEEK_LEAD = 0.4  # frames: less than half, which rounds either way where a container counts time in frames (AVI),
SEEK_MARGIN = 0.3  # and times after a seek are then either 0.4 frames past a whole number or a hair around it
REORDERED_FRAMES = 16  # at most so many frames are shown before a key frame that comes before them in the file
KEY_FRAME_GAP = 512  # frames: twice what encoders leave between key frames; MPEG-TS is decoded from the next one on
DELAY_FRAMES = 0.1  # a picture that starts so much after its sound is sought again: SEEK_MARGIN has room for less
DECODING: dict[str, Any] = {"threads": 1, "fflags": "+discardcorrupt"}  # probe does not count these either
NO_CLIPS = {  # ffmpeg's formats that show letters as a picture, or play other files
    **dict.fromkeys(("tty", "bin", "xbin", "adf", "idf"), "text, not a video"),
    **dict.fromkeys(("concat", "hls", "dash", "imf"), "a list of files to play, not a video"),
}
TIFF = (b"II*\0", b"MM\0*")
NO_TIME = str(-(1 << 63))  # AV_NOPTS_VALUE
DISCARD_OR_CORRUPT = 0x2 | 0x4  # packet flags of libavcodec


@dataclass(frozen=True)
class VideoInfo:
    """What a table row knows of a file: `height` and `width` after rotation, `fps` on average.

    `rotation` is in degrees, counter-clockwise, 0 to 359. Images are videos of one frame with `fps` NaN.
    """

    num_frames: int
    height: int
    width: int
    fps: float
    variable_fps: bool = False
    rotation: int = 0


def probe(clip: Clip, *, fps: float | int | None = None) -> VideoInfo:
    """Returns the facts of the first video stream, from its packets; an image is decoded.

    `fps` is the rate of Stills, which have none of their own. Raises VideoError with the reason.
    """
    if isinstance(clip, Stills):
        return _probe_stills(clip, fps)
    check_file(clip)
    with as_file(clip) as path:
        return _probe_file(path)


def read_frames(
    clip: Clip,
    info: VideoInfo,
    *,
    picks: Int[np.ndarray, " T"],
    size: tuple[int, int] | None = None,
    crop: tuple[int, int, int, int] | None = None,
) -> UInt8[np.ndarray, "T H W 3"]:
    """Returns the frames numbered `picks` (from 0, ascending) of `size` (h, w), cut to `crop` (top, left, h, w).

    None stands for the frames' own size, and for no cut. Rotation is applied first. Variable-rate files are
    read on a uniform grid of `info.fps`: at each of its times the newest frame, one that comes within half a
    grid step included. Scaling is bicubic with antialiasing, in the ffmpeg graph, so that only the wanted pixels
    pass the pipe. Decoding ends with the last pick. Where sound starts before the picture it takes two runs of ffmpeg.
    Raises VideoError if the file has fewer frames or ones of another shape, is damaged among them (or just
    after: the decoder runs ahead), or takes over TIMEOUT_SECONDS.
    """
    if not len(picks) or picks[0] < 0 or (np.diff(picks) < 1).any():
        raise ValueError(f"numbers of frames ascend from 0 on: got {picks}")
    if picks[-1] >= info.num_frames:
        raise VideoError(f"frames {picks[0]} to {picks[-1]} wanted, the file has {info.num_frames}")
    if isinstance(clip, Stills):
        clip, picks = clip.joined(picks.tolist()), np.arange(len(picks))
    size = size or (info.height, info.width)
    check_file(clip)
    with as_file(clip) as path:
        return _read_file(path, _Wanted(info, picks, size, crop or (0, 0, *size)))


@dataclass(frozen=True)
class _Wanted:
    """The arguments of `read_frames`."""

    info: VideoInfo
    picks: Int[np.ndarray, " T"]
    size: tuple[int, int]
    crop: tuple[int, int, int, int]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """That of the result."""
        return len(self.picks), self.crop[2], self.crop[3], 3


def _read_file(path: str, wanted: _Wanted) -> UInt8[np.ndarray, "T H W 3"]:
    """Does as `read_frames`, decoding from further and further before the first pick on until all frames are there."""
    info, first, delay = wanted.info, int(wanted.picks[0]), 0.0
    starts = list(dict.fromkeys(max(0, first - lead) for lead in (0, REORDERED_FRAMES, KEY_FRAME_GAP, first)))
    while starts:
        status, out, log = run(_clip_graph(path, wanted, starts[0], delay).global_args("-xerror"), "info")
        if starts[0] and not delay and _delay(log) * info.fps > DELAY_FRAMES:
            delay = _delay(log)
            continue
        if not status and len(out) == math.prod(wanted.shape):
            return np.frombuffer(out, np.uint8).reshape(wanted.shape)
        if WRONG_SHAPE in log:
            raise VideoError(f"its frames have not the shape {info.height}x{info.width} of its row: probe it again")
        del starts[0]
    if status:
        raise VideoError(reason(log))
    decoded = len(out) // math.prod(wanted.shape[1:])
    raise VideoError(f"{len(wanted.picks)} frames wanted from frame {first}, {decoded} decoded")


def _delay(log: str) -> float:
    """Returns the seconds from the start of a file, which is that of its sound if it comes first, to the picture's."""
    listing = log.partition("Output #0")[0]
    file = re.search(r"^\[info\] +Duration: .*, start: (-?[\d.]+)", listing, re.MULTILINE)
    streams = re.findall(r"^\[info\] +Stream #0:\d+.*: Video: (?!.*\(attached pic\))(.*)", listing, re.MULTILINE)
    if not file or not streams:
        return 0.0
    picture = re.search(r", start (-?[\d.]+)", streams[0])  # not told where it is 0
    return max(0.0, float(picture[1] if picture else 0) - float(file[1]))


def _clip_graph(path: str, wanted: _Wanted, first: int, delay: float) -> Any:
    """Frames from `first` on -> picks -> check of the shape -> scale -> crop; the picture starts after `delay` s."""
    info, size, crop = wanted.info, wanted.size, wanted.crop
    number = f"floor(t*{info.fps:.9f}+{SEEK_MARGIN})"
    if info.variable_fps:
        first = max(0, first - REORDERED_FRAMES)
        video = _on_a_grid(path, info, first, delay)
    elif first:
        video = _from(path, info, first, int(wanted.picks[-1]), delay)
    else:
        video, number = source(path, **DECODING, **(_strict(path) if info.num_frames == 1 else {}))["V:0"], "n"
    video = video.filter("select", f"st(0,{number});{_selection(wanted.picks - first)}")
    shaped = f"lt(abs(iw/ih*{info.height / info.width:.9f}-1),{SHAPE_SLACK})"
    video = video.filter("crop", w=f"if({shaped},iw,-1)", h="ih", x=0, y=0, exact=1)  # -1 ends ffmpeg
    video = video.filter("scale", size[1], size[0], flags=SCALE_FLAGS, **PILLOWS_KERNEL).filter("format", "rgb24")
    video = video.filter("crop", crop[3], crop[2], crop[1], crop[0])
    output = {"frames:v": len(wanted.picks), "fps_mode": "passthrough"}
    return video.output("pipe:", format="rawvideo", pix_fmt="rgb24", **output)


def _from(path: str, info: VideoInfo, first: int, last: int, delay: float) -> Any:
    """Returns the video from a little before `first`, safe from rounding, to `last`.

    The decoder can lack frames that are shown before the key frame it starts at. So frames after a seek are told
    by their time: a missing one is missed then, and no search for it runs to the end of the file.
    """
    video = source(path, **DECODING, ss=f"{(first - SEEK_LEAD) / info.fps + delay:.6f}")["V:0"]
    return video.filter("trim", end=f"{(last - first + 1) / info.fps:.6f}")


def _on_a_grid(path: str, info: VideoInfo, first: int, delay: float) -> Any:
    """Returns a variable-rate video on its uniform grid, from `first` at time 0 on or earlier.

    It is decoded from a key frame on: the grid shows a frame until the next one comes, which may take long. Where the
    decoder starts too late (see `_from`), the grid does too.
    """
    grid = {"fps": f"{info.fps:.9f}", "round": "near", "eof_action": "pass"}
    if not first:
        return source(path, **DECODING)["V:0"].filter("setpts", "PTS-STARTPTS").filter("fps", **grid)
    seek = {"ss": f"{first / info.fps + delay:.6f}", "noaccurate_seek": None}
    return source(path, **DECODING, **seek)["V:0"].filter("fps", **grid)


def _selection(numbers: Int[np.ndarray, " T"]) -> str:
    """Returns ffmpeg's expression that is true where ld(0) is one of these: a term for every run of equal steps."""
    terms, first = [], 0
    while first < len(numbers):
        steps = np.diff(numbers[first:])
        last = first + int(np.argmin(np.append(steps == steps[:1], False)))
        step = steps[0] if last > first else 1
        terms.append(f"between(ld(0),{numbers[first]},{numbers[last]})*not(mod(ld(0)-{numbers[first]},{step}))")
        first = last + 1
    return "+".join(terms)


def _probe_file(path: str) -> VideoInfo:
    packets = source(path, threads=1)["V:0"].output("pipe:", codec="copy", format="framecrc")
    status, out, log = run(packets, "info")
    if "matches no streams" in log:
        raise VideoError("no video stream in the file")
    if status:
        raise VideoError(reason(log))
    form = re.search(r"^\[info\] Input #0, (\w+)", log, re.MULTILINE)
    if form and form[1] in NO_CLIPS:
        raise VideoError(NO_CLIPS[form[1]])
    info = _parse_packets(out.decode("ascii", "replace"), log)
    return info if info.num_frames > 1 else _decoded(path, info)


def _parse_packets(listing: str, log: str) -> VideoInfo:
    """Reads framecrc's `#key 0: value` lines and rows `stream, dts, pts, duration, bytes, crc[, F=flags]`."""
    header = dict(re.findall(r"^#(\w+) 0: (\S+)", listing, re.MULTILINE))
    rows = [line.replace(" ", "").split(",") for line in listing.splitlines() if line[:1] == "0"]
    times = [row[2] for row in rows if not _flags(row) & DISCARD_OR_CORRUPT]
    width, height = (int(x) for x in header.get("dimensions", "0x0").split("x"))
    if not times or not width or not height:
        raise VideoError("the video stream holds no frames")
    rotation = _rotation(log)
    if rotation in (90, 270):
        height, width = width, height
    ticks = np.sort(np.array(times, np.int64))
    if len(ticks) == 1:
        return VideoInfo(1, height, width, float("nan"), False, rotation)
    if NO_TIME in times or ticks[-1] == ticks[0]:  # some AVI and MPEG program streams
        raise VideoError("not all frames carry times: convert the file, to .mp4 for example")
    fps = _rate(ticks, Fraction(header["tb"]))
    grid = np.linspace(ticks[0], ticks[-1], len(ticks))
    jitter = np.abs(ticks - grid).max() * (len(ticks) - 1) / (ticks[-1] - ticks[0])
    return VideoInfo(len(ticks), height, width, fps, bool(jitter > JITTER_FRAMES), rotation)


def _rate(ticks: Int[np.ndarray, " N"], tick: Fraction) -> float:
    """Returns frames per second: whole ones, or N * 1000 / 1001, where rounded times can mean these.

    Containers round times to their tick, and MKV, WebM, FLV and what was made of them to 1 ms: 24 fps seem to be 24.002
    there. Times of even distance are exact.
    """
    times = (ticks - ticks[0]) * float(tick)
    fps = (len(ticks) - 1) / float((ticks[-1] - ticks[0]) * tick)
    rounding = max(float(tick), MILLISECOND)
    if not np.ptp(np.diff(ticks)) or rounding * fps > JITTER_FRAMES:
        return fps
    near = [rate for rate in (round(fps), round(fps * 1.001) * 1000 / 1001) if rate]
    meant = [rate for rate in near if abs((len(ticks) - 1) / rate - times[-1]) <= rounding]
    return float(min(meant, key=lambda rate: np.ptp(times - np.arange(len(ticks)) / rate), default=fps))


def _probe_stills(stills: Stills, fps: float | int | None) -> VideoInfo:
    if not stills:
        raise VideoError("the video holds no frames")
    first = probe(stills[0])
    if len(stills) == 1:
        return first
    if fps is None:
        raise VideoError("a list of stills without a frame rate: give `dataset meta` --fps")
    return replace(first, num_frames=len(stills), fps=float(fps))


def _decoded(path: str, info: VideoInfo) -> VideoInfo:
    """Returns the facts of an image with the size of its pixels: a rotation may stand inside the frame (Exif)."""
    graph = source(path, **DECODING, **_strict(path))["V:0"].output("pipe:", format="framecrc").global_args("-xerror")
    status, out, log = run(graph, "error")
    size = re.search(rb"^#dimensions 0: (\d+)x(\d+)", out, re.MULTILINE)
    if status or not size:
        raise VideoError(reason(log))
    return replace(info, height=int(size[2]), width=int(size[1]))


def check_file(clip: str | Path | bytes) -> None:
    """Raises VideoError unless there is a file, or bytes, with something in it."""
    if isinstance(clip, bytes):
        size = len(clip)
    elif "://" in str(clip):
        raise VideoError("a URL, not a file: download it first")
    else:
        try:
            found = os.stat(clip)
        except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a zero byte in the name
            raise VideoError("no such file") from None
        except OSError as error:
            raise VideoError(f"cannot be opened: {error.strerror}") from None
        if not stat.S_ISREG(found.st_mode):
            raise VideoError("not a file")
        size = found.st_size
    if not size:
        raise VideoError("the file is empty")


def _strict(path: str) -> dict[str, Any]:
    """Returns what ends ffmpeg at the first error: else half a JPEG counts as a whole one.

    Not so for TIFF, where a tag that ffmpeg does not know is an error to it.
    """
    try:
        with open(path, "rb") as file:
            return {} if file.read(4) in TIFF else {"err_detect": "explode"}
    except OSError as error:
        raise VideoError(f"cannot be opened: {error.strerror}") from None


def _flags(row: list[str]) -> int:
    return int(row[6].removeprefix("F="), 16) if len(row) > 6 and row[6].startswith("F=") else 0


def _rotation(log: str) -> int:
    found = re.search(r"Display Matrix: rotation of (-?[\d.]+) degrees", log.partition("Output #0")[2])
    return round(float(found[1])) % 360 if found else 0
