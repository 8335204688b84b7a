"""Which weights lie in a place, told by names, sizes and times of files: reading an 11B model would take minutes."""

from pathlib import Path

from opensora_jax.weights.files import INDEX, read_index

Stamp = tuple[str, int, int]  # name below the place, bytes, modification time in ns


def newest_step(path: Path) -> Path:
    """Returns the newest step of a workdir, and any other path as it is."""
    steps = [step for step in path.glob("checkpoints/*") if step.name.isdigit()]
    return max(steps, key=lambda step: int(step.name), default=path)


def file_stamps(path: str | Path) -> list[Stamp]:
    """Returns the stamps of a file of weights, of an index and its shards, of a folder's files; none where nothing is.

    Of a workdir they are those of its newest step. Raises: UserError for a damaged index.
    """
    root = newest_step(Path(path))
    files = sorted(root.rglob("*")) if root.is_dir() else [root]
    if root.is_file() and root.name.endswith(INDEX):
        root, files = root.parent, [root, *(root.parent / name for name in sorted(set(read_index(root).values())))]
    stats = [(str(file.relative_to(root)), file.stat()) for file in files if file.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
