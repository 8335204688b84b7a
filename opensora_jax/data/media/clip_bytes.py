"""Clips that are no files: encoded bytes out of a shard, and videos stored as a list of encoded stills.

ffmpeg must seek, which a pipe cannot, so bytes are given to it as a file in memory that has a path.
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
def as_file(data: bytes) -> Iterator[str]:
    """Yields the path of a file with these bytes, in memory where the system can, for the time of the context.

    The path is good for other processes of the user too.
    """
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
