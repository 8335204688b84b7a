"""ArrayRecord files: written under another name until they are whole, read at random from many threads.

The reader opens a file when it is first asked for it and keeps it open: opening costs more than reading a record.
"""

import errno
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from opensora_jax.config.files import unfinished

WRITE_OPTIONS = "group_size:1,uncompressed"  # larger groups read slowly at random; noise and video do not compress
READ_OPTIONS = "readahead_buffer_size:0"
READ_BUFFER_BYTES = 32768
OPEN_FILES = 256


class RecordError(Exception):
    """A record that cannot be read; the message names the file and what is wrong with it."""


class RecordWriter:
    """Writes the records of a file, which has its name once it is closed; errors of the disk are OSErrors."""

    def __init__(self, path: Path):
        self.path, self._unfinished = path, unfinished(path)
        self._writer = ArrayRecordWriter(str(self._unfinished), WRITE_OPTIONS)

    def write(self, record: bytes) -> None:
        """Adds a record."""
        self._guarded(self._writer.write, record)

    def close(self) -> int:
        """Returns the bytes of the file, which is whole now."""
        self._guarded(self._writer.close)
        size = self._unfinished.stat().st_size
        os.replace(self._unfinished, self.path)
        return size

    def give_up(self) -> None:
        """Leaves nothing behind of a file that is not closed."""
        self._writer = None
        self._unfinished.unlink(missing_ok=True)

    def _guarded(self, action: Any, *arguments: Any) -> None:
        try:
            action(*arguments)
        except RuntimeError as error:
            number = errno.ENOSPC if "No space left" in str(error) else errno.EIO
            raise OSError(number, str(error), str(self.path)) from error


class RecordReader:
    """Reads records of any number of files; the files used last stay open."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: str | Path, record: int) -> bytes:
        """Returns a record of a file. Raises: RecordError when it is not there or damaged."""
        if record < 0:
            raise RecordError(f"{path}, record {record}: records are numbered from 0")
        try:
            return self._reader(str(path)).read([record])[0]
        except RuntimeError as error:
            with self._lock:
                self._open.pop(str(path), None)  # so that a file that is mended is opened again
            raise RecordError(f"{path}, record {record}: {str(error).split(';')[0]}") from error

    def _reader(self, path: str) -> Any:
        with self._lock:
            if path in self._open:
                self._open.move_to_end(path)
                return self._open[path]
        reader = ArrayRecordReader(path, options=READ_OPTIONS, file_reader_buffer_size=READ_BUFFER_BYTES)
        with self._lock:
            reader = self._open.setdefault(path, reader)
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)  # closed when the last thread that reads it lets go of it
        return reader
