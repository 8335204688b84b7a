"""Clips that ffmpeg cannot be given by their path: encoded bytes out of a shard, lists of stills, patterns of names.

ffmpeg must seek, which a pipe cannot, so bytes are given to it as a file in memory that has a path. A file whose name
it would take for a pattern (`a%d.png`: all of a0.png, a1.png, ...) gets another one by a link.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class Stills(tuple[bytes, ...]):
    """The frames of a video, each an encoded image; there is no frame rate (TFDS's Video feature)."""

    def joined(self, picks: Iterable[int]) -> bytes:
        """Returns the stills of these numbers one after the other, which ffmpeg reads as frames; no others."""
        return b"".join(self[pick] for pick in picks if pick < len(self))


Clip = str | Path | bytes | Stills


@contextmanager
def as_file(clip: str | Path | bytes) -> Iterator[str]:
    """Yields a path that means these bytes or this file and no other, for the time of the context.

    Bytes are a file in memory where the system can. The path is good for other processes of the user too.
    """
    if isinstance(clip, bytes):
        with _bytes_as_file(clip) as path:
            yield path
    elif "%" in (path := os.path.abspath(clip)):
        with tempfile.TemporaryDirectory() as folder:
            link = os.path.join(folder, f"clip{os.path.splitext(path)[1].replace('%', '')}")
            os.symlink(path, link)
            yield link
    else:
        yield path


@contextmanager
def _bytes_as_file(data: bytes) -> Iterator[str]:
    if hasattr(os, "memfd_create"):
        with open(os.memfd_create("clip"), "wb") as file:
            file.write(data)
            file.flush()
            yield f"/proc/{os.getpid()}/fd/{file.fileno()}"
    else:
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            yield file.name
