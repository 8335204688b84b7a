"""Probe, decode and encode video through ffmpeg processes: any codec works and no library holds the GIL.

ffmpeg-python builds the command lines; the binary is `$FFMPEG_BINARY`, else that of the imageio-ffmpeg wheel
(the same version, hence the same pixels, on every host), else the one on PATH. ffprobe is not needed: the
`framecrc` muxer lists every packet of a stream without decoding it.
"""

import errno
import os
import re
import shutil
import subprocess
import threading
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import ffmpeg
import imageio_ffmpeg
import numpy as np
from jaxtyping import UInt8

from opensora_jax.config.errors import UserError

TIMEOUT_SECONDS = 120
SCALE_FLAGS = "bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"  # bicubic widens when shrinking: antialiased
JITTER_FRAMES = 0.25  # a frame further than this from the uniform grid makes a file variable-rate
DISCARD_OR_CORRUPT = 0x2 | 0x4  # packet flags of libavcodec


class VideoError(Exception):
    """A file cannot be used as video; the message is the reason, without the path."""


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


def probe(path: str | Path) -> VideoInfo:
    """Returns the facts of the first video stream, from its packets. Raises VideoError with the reason."""
    if "://" in str(path):
        raise VideoError("a URL, not a file: download it first")
    if not os.path.isfile(path):
        raise VideoError("not a file" if os.path.exists(path) else "no such file")
    if not os.path.getsize(path):
        raise VideoError("the file is empty")
    packets = _input(path, threads=1)["V:0"].output("pipe:", codec="copy", format="framecrc")
    status, out, log = _run(packets, "info")
    if "matches no streams" in log:
        raise VideoError("no video stream in the file")
    if status:
        raise VideoError(_reason(log))
    return _parse_packets(out.decode("ascii", "replace"), log)


def read_frames(
    path: str | Path,
    info: VideoInfo,
    *,
    start: int,
    count: int,
    stride: int,
    size: tuple[int, int],
    crop: tuple[int, int, int, int],
) -> UInt8[np.ndarray, "T H W 3"]:
    """Returns frames `start + stride * i`, i < count, of `size` (h, w), cut to `crop` (top, left, h, w).

    Rotation is applied first. Variable-rate files are read on a uniform grid of `info.fps`: at each of its
    times the nearest frame. Scaling is bicubic with antialiasing, in the ffmpeg graph, so that only the
    wanted pixels pass the pipe. Where sound starts half a frame or more before the picture, frames are that
    much early.
    Raises VideoError if the file has fewer frames, is damaged among them (or just after: the decoder runs
    ahead), or takes over TIMEOUT_SECONDS.
    """
    if start < 0 or start + (count - 1) * stride >= info.num_frames:
        wanted = f"frames {start} to {start + (count - 1) * stride}"
        raise VideoError(f"{wanted} wanted, the file has {info.num_frames}")
    frame_bytes = crop[2] * crop[3] * 3
    graph = _clip_graph(path, info, start, count, stride, size, crop).global_args("-xerror")
    status, out, log = _run(graph, "error")
    if status:
        raise VideoError(_reason(log))
    if len(out) != count * frame_bytes:
        raise VideoError(f"{count} frames wanted from frame {start}, {len(out) // frame_bytes} decoded")
    return np.frombuffer(out, np.uint8).reshape(count, crop[2], crop[3], 3)


def write_video(path: str | Path, frames: UInt8[np.ndarray, "T H W 3"], fps: int | float, *, crf: int = 17) -> Path:
    """Writes H.264 (yuv420p, bt709) as `.mp4`, one frame as `.png`; returns the path with that suffix.

    The file appears complete or not at all, and the same frames give the same bytes. Raises VideoError for
    odd sizes, OSError for a full or read-only disk.
    """
    T, H, W, _ = frames.shape
    path = Path(path).with_suffix(".png" if T == 1 else ".mp4")
    if T > 1 and (H % 2 or W % 2):
        raise VideoError(f"H.264 needs an even height and width: got {H}x{W}")
    temporary = path.with_name(f".{path.stem}.{os.getpid()}-{threading.get_ident()}{path.suffix}")
    temporary.open("wb").close()  # Python's own error where the folder is missing or read-only
    try:
        graph = _still_graph if T == 1 else _movie_graph
        status, _, log = _run(graph(_raw_input(frames, fps), temporary, crf), "error", frames)
        if "No space left" in log:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if status:
            raise VideoError(_reason(log))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_gif(path: str | Path | None, frames: UInt8[np.ndarray, "T H W 3"], fps: int | float) -> bytes:
    """Returns an endless GIF with a palette of its own, and writes it to `path` unless that is None."""
    split = _raw_input(frames, fps).filter_multi_output("split")
    palette = split[0].filter("palettegen", stats_mode="full")
    graph = ffmpeg.filter([split[1], palette], "paletteuse").output("pipe:", format="gif")
    status, out, log = _run(graph, "error", frames)
    if status:
        raise VideoError(_reason(log))
    if path is not None:
        temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
        temporary.write_bytes(out)
        os.replace(temporary, path)
    return out


def binary() -> str:
    """Returns the ffmpeg to run. Raises UserError if there is none."""
    chosen = os.environ.get("FFMPEG_BINARY")
    if chosen:
        if shutil.which(chosen) is None:
            raise UserError(f"FFMPEG_BINARY={chosen} is no executable; unset it or give the path of an ffmpeg.")
        return chosen
    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        found = shutil.which("ffmpeg")
    if found is None:
        raise UserError("No ffmpeg found: `pip install imageio-ffmpeg`, or set FFMPEG_BINARY to an executable.")
    return found


def _input(path: str | Path, **options: Any) -> Any:
    return ffmpeg.input(f"file:{os.path.abspath(path)}", **options)  # no protocol or option hides in a name


def _clip_graph(
    path: str | Path,
    info: VideoInfo,
    start: int,
    count: int,
    stride: int,
    size: tuple[int, int],
    crop: tuple[int, int, int, int],
) -> Any:
    """Seek (half a frame early: rounding is safe) -> uniform grid -> every stride-th -> scale -> crop."""
    options: dict[str, Any] = {"threads": 1, "fflags": "+discardcorrupt"}  # probe does not count these either
    lead = 0.5 / info.fps if start else 0.0
    if start:
        options["ss"] = f"{start / info.fps - lead:.6f}"
    video = _input(path, **options)["V:0"]
    if info.variable_fps:
        video = video.filter("fps", fps=f"{info.fps:.9f}", start_time=f"{lead:.6f}", round="near", eof_action="pass")
    video = video.filter("select", f"not(mod(n,{stride}))")
    video = video.filter("scale", size[1], size[0], flags=SCALE_FLAGS).filter("format", "rgb24")
    video = video.filter("crop", crop[3], crop[2], crop[1], crop[0])
    output = {"frames:v": count, "fps_mode": "passthrough"}
    return video.output("pipe:", format="rawvideo", pix_fmt="rgb24", **output)


def _raw_input(frames: np.ndarray, fps: int | float) -> Any:
    size = (frames.shape[2], frames.shape[1])
    rate = str(Fraction(fps).limit_denominator(1001))
    return ffmpeg.input("pipe:", format="rawvideo", pix_fmt="rgb24", video_size=size, framerate=rate)


def _movie_graph(video: Any, path: Path, crf: int) -> Any:
    video = video.filter("scale", out_color_matrix="bt709", out_range="tv", flags=SCALE_FLAGS)
    color = {"colorspace": "bt709", "color_primaries": "bt709", "color_trc": "bt709", "color_range": "tv"}
    exact = {
        "fflags": "+bitexact",
        "flags:v": "+bitexact",
        "movflags": "+faststart",
    }  # same input, same bytes
    codec = {"vcodec": "libx264", "pix_fmt": "yuv420p", "crf": crf, "threads": 1}
    return video.output(f"file:{path.absolute()}", format="mp4", **codec, **color, **exact)


def _still_graph(video: Any, path: Path, crf: int) -> Any:
    del crf  # PNG is lossless
    return video.output(f"file:{path.absolute()}", format="image2", vcodec="png", update=1, **{"frames:v": 1})


def _run(graph: Any, loglevel: str, frames: np.ndarray | None = None) -> tuple[int, bytes, str]:
    """Returns (exit status, standard output, log); the log's lines carry their level in brackets."""
    graph = graph.global_args("-nostdin", "-hide_banner", "-nostats", "-loglevel", f"level+{loglevel}")
    pipes = {"pipe_stdin": frames is not None, "pipe_stdout": True, "pipe_stderr": True}
    data = None if frames is None else np.ascontiguousarray(frames).data.cast("B")
    with ffmpeg.run_async(graph, binary(), overwrite_output=True, **pipes) as process:
        try:
            out, log = process.communicate(data, timeout=TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise VideoError(f"ffmpeg took longer than {TIMEOUT_SECONDS} s") from None
        except BaseException:
            process.kill()
            raise
    return process.returncode, out, log.decode("utf-8", "replace")


def _parse_packets(listing: str, log: str) -> VideoInfo:
    """Reads framecrc's `#key 0: value` lines and rows `stream, dts, pts, duration, bytes, crc[, F=flags]`."""
    header = dict(re.findall(r"^#(\w+) 0: (\S+)", listing, re.MULTILINE))
    rows = [line.replace(" ", "").split(",") for line in listing.splitlines() if line[:1] == "0"]
    times = [row[2] if row[2] != "NOPTS" else row[1] for row in rows if not _flags(row) & DISCARD_OR_CORRUPT]
    width, height = (int(x) for x in header.get("dimensions", "0x0").split("x"))
    if not times or not width or not height:
        raise VideoError("the video stream holds no frames")
    rotation = _rotation(log)
    if rotation in (90, 270):
        height, width = width, height
    ticks = np.sort(np.array([int(t) for t in times if t.lstrip("-").isdigit()], np.int64))
    if len(times) == 1:
        return VideoInfo(1, height, width, float("nan"), False, rotation)
    if len(ticks) != len(times) or ticks[-1] == ticks[0]:
        raise VideoError("the frames carry no times")
    fps = (len(ticks) - 1) / float((ticks[-1] - ticks[0]) * Fraction(header["tb"]))
    grid = np.linspace(ticks[0], ticks[-1], len(ticks))
    jitter = np.abs(ticks - grid).max() * (len(ticks) - 1) / (ticks[-1] - ticks[0])
    return VideoInfo(len(ticks), height, width, fps, bool(jitter > JITTER_FRAMES), rotation)


def _flags(row: list[str]) -> int:
    return int(row[6].removeprefix("F="), 16) if len(row) > 6 and row[6].startswith("F=") else 0


def _rotation(log: str) -> int:
    found = re.search(r"Display Matrix: rotation of (-?[\d.]+) degrees", log.partition("Output #0")[2])
    return round(float(found[1])) % 360 if found else 0


def _reason(log: str) -> str:
    """Returns ffmpeg's first complaint, without its component and address."""
    found = re.search(r"^(?:\[[^\]]* @ 0x\w+\] )*\[(?:error|fatal)\] (.+)$", log, re.MULTILINE)
    return f"ffmpeg: {found[1].strip()[:200]}" if found else "ffmpeg failed without a message"
