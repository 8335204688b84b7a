"""Videos written through ffmpeg: H.264, PNG and GIF from frames, NUT from encoded stills.

Files appear complete or not at all, and the same frames give the same bytes.
"""

import errno
import os
import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import ffmpeg
import numpy as np
from jaxtyping import UInt8

from opensora_jax.config.files import replacing
from opensora_jax.data.media.clip_bytes import Stills, as_file
from opensora_jax.data.media.ffmpeg_process import VideoError, reason, run, source
from opensora_jax.data.media.video import SCALE_FLAGS


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
        status, _, log = run(graph(_raw_input(frames, fps), temporary, crf), "error", frames)
        if "No space left" in log:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if status:
            raise VideoError(reason(log))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_gif(path: str | Path | None, frames: UInt8[np.ndarray, "T H W 3"], fps: int | float) -> bytes:
    """Returns an endless GIF with a palette of its own, and writes it to `path` unless that is None."""
    split = _raw_input(frames, fps).filter_multi_output("split")
    palette = split[0].filter("palettegen", stats_mode="full")
    graph = ffmpeg.filter([split[1], palette], "paletteuse").output("pipe:", format="gif")
    status, out, log = run(graph, "error", frames)
    if status:
        raise VideoError(reason(log))
    if path is not None:
        with replacing(Path(path)) as temporary:
            temporary.write_bytes(out)
    return out


def mux_stills(stills: Stills, fps: float | int) -> bytes:
    """Returns stills as a NUT file, whose times are exact, of that rate; they are not encoded again.

    Raises VideoError with the reason.
    """
    with as_file(stills.joined(range(len(stills)))) as path:
        frames = source(path, framerate=str(Fraction(fps).limit_denominator(1001)))["V:0"]
        status, out, log = run(frames.output("pipe:", codec="copy", format="nut"), "error")
    if status:
        raise VideoError(reason(log))
    return out


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
