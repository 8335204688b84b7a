"""One run of ffmpeg: which binary, a time limit, and its first complaint as the reason of a VideoError.

ffmpeg-python builds the command lines; the binary is `$FFMPEG_BINARY`, else that of the imageio-ffmpeg wheel (the same
version, hence the same pixels, on every host), else the one on PATH.
"""

import os
import re
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import ffmpeg
import imageio_ffmpeg
import numpy as np

from opensora_jax.config.errors import UserError

TIMEOUT_SECONDS = 120
TIMEOUTS = 2  # runs that may take as long: one alone can be the fault of a busy machine
ATTEMPTS = 3  # of a run that a signal ended


class VideoError(Exception):
    """A file cannot be used as video; the message is the reason, without the path."""


def source(path: str | Path, **options: Any) -> Any:
    """Returns a file as the input of a graph."""
    return ffmpeg.input(f"file:{os.path.abspath(path)}", **options)  # no protocol or option hides in a name


def run(graph: Any, loglevel: str, frames: np.ndarray | None = None) -> tuple[int, bytes, str]:
    """Returns (exit status, standard output, log); the log's lines carry their level in brackets.

    A scheduler that stops a job may send its signal to ffmpeg as well, and a busy machine may let it wait: then it runs
    once more, so that a clip is not taken for a bad one because of when it was read. Raises VideoError if it takes over
    TIMEOUT_SECONDS again.
    """
    graph = graph.global_args("-nostdin", "-hide_banner", "-nostats", "-loglevel", f"level+{loglevel}")
    pipes = {"pipe_stdin": frames is not None, "pipe_stdout": True, "pipe_stderr": True}
    data = None if frames is None else np.ascontiguousarray(frames).data.cast("B")
    for _ in range(ATTEMPTS):
        status, out, log = _run_in_time(graph, pipes, data)
        if status >= 0 and status != 255:  # what ffmpeg ends with after a signal that it handles
            break
    return status, out, log.decode("utf-8", "replace")


def _run_in_time(graph: Any, pipes: dict[str, bool], data: memoryview | None) -> tuple[int, bytes, bytes]:
    for _ in range(TIMEOUTS):
        with suppress(subprocess.TimeoutExpired):
            return _run_once(graph, pipes, data)
    raise VideoError(f"ffmpeg took longer than {TIMEOUT_SECONDS} s, {TIMEOUTS} times")


def _run_once(graph: Any, pipes: dict[str, bool], data: memoryview | None) -> tuple[int, bytes, bytes]:
    with ffmpeg.run_async(graph, binary(), overwrite_output=True, **pipes) as process:
        try:
            out, log = process.communicate(data, timeout=TIMEOUT_SECONDS)
        except BaseException:
            process.kill()
            raise
    return process.returncode, out, log


def reason(log: str) -> str:
    """Returns ffmpeg's first complaint, without its component and address."""
    found = re.search(r"^(?:\[[^\]]* @ 0x\w+\] )*\[(?:error|fatal)\] (.+)$", log, re.MULTILINE)
    return f"ffmpeg: {found[1].strip()[:200]}" if found else "ffmpeg failed without a message"


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
