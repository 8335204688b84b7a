"""What probing finds of a clip, and the processes that probe many.

Each clip under way has a Python process of its own: of the 20 ms that a small clip takes 2 are spent under Python's
lock (starting ffmpeg, reading its answer), so that the threads of one process would stop at some 600 clips a second,
whatever the machine.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pyarrow as pa

from opensora_jax.config.errors import UserError
from opensora_jax.data.media.ffmpeg_process import VideoError
from opensora_jax.data.media.video import check_file, probe
from opensora_jax.data.shards.shards import ShardReader

Row = dict[str, Any]

SHARDS = ShardReader()
CHUNK = 16  # clips that a process takes at a time
REPLACED = "\N{REPLACEMENT CHARACTER}"
NOTHING: Row = {
    "text": "",
    "num_frames": 0,
    "height": 0,
    "width": 0,
    "aspect_ratio": 0.0,
    "resolution": 0,
    "fps": float("nan"),
    "variable_fps": False,
    "status": "bad",
    "reason": "",
}


def describe(path: str, shard: str = "", record: int = 0, *, fps: float | int | None = None) -> Row:
    """Returns the row of one clip, by probing it; a useless clip gives a bad row, never an exception.

    The text is what a shard holds beside the clip.
    `fps` is the rate of videos that a TFDS set stores as lists of stills.
    """
    row = {"path": path, "shard": shard, "record": record} | NOTHING
    row["mtime_ns"], row["size_bytes"] = file_stamp(shard or path)
    try:
        if shard:
            check_file(shard)
        clip, row["text"] = SHARDS.read_with_text(shard, record) if shard else (_file(path), "")
        info = probe(clip, fps=fps)
    except VideoError as error:
        return row | {"reason": str(error).removeprefix(f"{shard}, record {record}: ")}
    shape = {"height": info.height, "width": info.width, "num_frames": info.num_frames}
    derived = {"aspect_ratio": info.height / info.width, "resolution": info.height * info.width}
    return row | shape | derived | {"fps": info.fps, "variable_fps": info.variable_fps, "status": "ok"}


def file_stamp(path: str) -> tuple[int, int]:
    """Returns what tells a changed file: (modification time in ns, size in bytes), zeros if there is none."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError):  # ValueError: a zero byte in the name
        return 0, 0
    return stat.st_mtime_ns, stat.st_size


def describe_all(chunk: list[Row], fps: float | int | None = None) -> list[Row]:
    """Returns `describe` of each clip."""
    return [describe(**clip, fps=fps) for clip in chunk]


def in_processes(clips: pa.Table, num_workers: int, fps: float | int | None = None) -> Iterator[list[Row]]:
    """Yields the rows of all clips, found by `num_workers` processes; by this one if there is work for one only.

    Raises UserError if a worker dies.
    """
    chunks = (batch.to_pylist() for batch in clips.to_batches(max_chunksize=CHUNK))
    num_workers = min(num_workers, -(-len(clips) // CHUNK))
    if num_workers <= 1:
        yield from (describe_all(chunk, fps) for chunk in chunks)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, context, initializer=_follow_parent)
    waiting: set[Future] = set()
    try:
        for chunk in chunks:
            waiting.add(pool.submit(describe_all, chunk, fps))
            if len(waiting) >= 4 * num_workers:  # so that millions of clips do not queue up in memory
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    except BrokenProcessPool:
        lost = "A worker process was killed, perhaps because memory ran out"
        raise UserError(f"{lost}: the same command goes on from here; try a smaller --num_workers.") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _file(path: str) -> str:
    """Returns the path of a row that means a file. Raises VideoError if it cannot mean one."""
    if not path:
        raise VideoError("the row has no path")
    if REPLACED in path and not os.path.exists(path):
        raise VideoError("the file name is not UTF-8")
    return path


def _follow_parent() -> None:
    """Leaves Ctrl-C to the parent, and ends this worker when the parent is gone, killed too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
