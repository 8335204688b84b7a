"""Files that appear complete or not at all: written under another name, which is exchanged when they are whole."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4


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
