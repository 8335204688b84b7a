"""Files that appear complete or not at all: written under another name, which is exchanged when they are whole."""

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from absl import logging

from opensora_jax.config.errors import UserError

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of file systems that know none


def unfinished(path: Path) -> Path:
    """Returns a name beside `path` for what is not yet whole, never the same twice; `is_unfinished` knows it."""
    return path.with_name(f".{path.name}.{uuid4().hex}.tmp")  # several processes may write the same file


def is_unfinished(name: str) -> bool:
    """Returns whether a file's name is one of those."""
    return name.startswith(".") and name.endswith(".tmp")


def sweep(folder: Path) -> None:
    """Deletes what killed runs left unfinished in a folder."""
    for path in folder.iterdir():
        if is_unfinished(path.name):
            path.unlink(missing_ok=True)


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Holds a lock on a file while the block runs; the system unlocks what is killed.

    Raises: UserError if another process holds it.
    """
    with ExitStack() as held:
        if not is_locked(path, held):
            raise UserError(f"Another run holds {path}: wait for it, or choose another --output.")
        yield


def is_locked(path: Path, held: ExitStack) -> bool:
    """Returns whether a file could be locked until `held` is closed; False where another process holds it."""
    return lock(held.enter_context(path.open("ab")))


def lock(file: IO[bytes]) -> bool:
    """Returns whether a file could be locked until it is closed; False where another process holds it.

    A file system without locks is told once, and counts as if nobody else were there.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        text = "%s cannot be locked (%s): see to it that no other run writes there"
        logging.log_first_n(logging.WARNING, text, 1, file.name, error.strerror)
    return True


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives the name to write under; what is there takes the place of `path` if the block ends without an error."""
    temporary = unfinished(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file; a crash leaves the old file or none."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
