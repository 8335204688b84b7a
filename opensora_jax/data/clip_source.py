"""Training samples out of clips: decoded frames and, where a tokenizer is given, the tokens of their captions.

What a read gives depends on sample, bucket and seed alone and not on what was read before. So does that it fails, while
the files stay as they are, the disk answers and ffmpeg is not late twice. A restarted run, or one with another number
of hosts, then replaces the same clips by the same others.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from absl import logging
from jaxtyping import Shaped

from opensora_jax.config.errors import UserError
from opensora_jax.data.loader import Batch
from opensora_jax.data.media.clip_bytes import Clip
from opensora_jax.data.media.transforms import frame_picks, frame_start, original_pixels, resize_and_crop, target_fps
from opensora_jax.data.media.video import VideoError, VideoInfo, read_frames
from opensora_jax.data.plan.buckets import Bucket
from opensora_jax.data.shards.shards import ShardReader

MIN_READS = 100  # the rate of bad clips means nothing before

Frames = Shaped[np.ndarray, "T H W 3"]


@dataclass(frozen=True)
class Captions:
    """The text of every row, and what turns one into arrays of tokens (name -> [S])."""

    texts: pa.ChunkedArray
    tokenize: Callable[[str], Batch]

    def tokens(self, sample_id: int) -> Batch:
        """Returns the tokens of a row."""
        return self.tokenize(self.texts[sample_id].as_py())


def read_scaled(clip: Clip, info: VideoInfo, picks: np.ndarray, target: tuple[int, int]) -> Frames:
    """Returns frames that ffmpeg scales, antialiased, and cuts to the target (height, width), in uint8."""
    size, crop = resize_and_crop(info.height, info.width, target, image=info.num_frames == 1)
    return read_frames(clip, info, picks=picks, size=size, crop=crop)


def read_original(clip: Clip, info: VideoInfo, picks: np.ndarray, target: tuple[int, int]) -> Frames:
    """Returns the same frames by Open-Sora 2.0's arithmetic, in float32 and [-1, 1]."""
    return original_pixels(read_frames(clip, info, picks=picks), target, image=info.num_frames == 1)


ReadFrames = Callable[[Clip, VideoInfo, np.ndarray, tuple[int, int]], Frames]
RESIZE: dict[str, ReadFrames] = {"ffmpeg": read_scaled, "original": read_original}


class ClipSource:
    """Clips decoded from the files or shards of a table; sample ids are its rows.

    Decoded clips stay in memory up to cache_bytes (0: none). `bad_clips` maps the paths that could not be
    read to their reasons; reading raises UserError when more than max_bad_rate of all reads met one.
    """

    def __init__(
        self,
        table: pa.Table,
        read_frames: ReadFrames,
        *,
        fps_max: float | int,
        cache_bytes: int,
        max_bad_rate: float | int,
        captions: Captions | None = None,
    ):
        self.fps_max, self.max_bad_rate, self.captions = fps_max, max_bad_rate, captions
        self.paths, self.shards, self.records = table["path"], table["shard"], table["record"].to_numpy()
        self.facts = {name: table[name].to_numpy() for name in ("num_frames", "height", "width", "fps", "variable_fps")}
        self.bad_clips: dict[str, str] = {}
        self._read_frames = read_frames
        self._reads = self._bad_reads = 0
        self._lock = threading.Lock()
        self._shard_reader = ShardReader()
        self._cache = _ClipCache(cache_bytes)

    def read(self, sample_id: int, bucket: Bucket, seed: int) -> Batch:
        """Returns video [T, H, W, 3], from a start that the seed draws, and the tokens. Raises VideoError."""
        with self._lock:
            self._reads += 1
        tokens = self.captions.tokens(sample_id) if self.captions else {}
        return {"video": self._video(sample_id, bucket, seed)} | tokens

    def is_readable(self, sample_id: int, bucket: Bucket, seed: int) -> bool:
        """Returns whether a clip can be read; neither the read nor a failure counts."""
        try:
            self._video(sample_id, bucket, seed)
        except VideoError:
            return False
        return True

    def _video(self, sample_id: int, bucket: Bucket, seed: int) -> Frames:
        info = VideoInfo(**{name: column[sample_id].item() for name, column in self.facts.items()})
        _, interval = target_fps(info.fps, self.fps_max)
        start = frame_start(info.num_frames, bucket.num_frames, interval, seed)
        key = (sample_id, bucket, start)
        video = self._cache.get(key)
        if video is None:
            picks = frame_picks(start, bucket.num_frames, interval, info.num_frames)
            video = self._read_frames(self._clip(sample_id), info, picks, (bucket.height, bucket.width))
            self._cache.put(key, video)
        return video

    def refuse(self, sample_id: int, error: VideoError) -> None:
        """Counts a bad read and logs a clip's first. Raises UserError above max_bad_rate."""
        path = str(self.paths[sample_id])
        with self._lock:
            self._bad_reads += 1
            if path not in self.bad_clips:
                logging.warning("cannot read %s: %s", path, error)
            self.bad_clips[path] = str(error)
            too_many = self._bad_reads > self.max_bad_rate * max(self._reads, MIN_READS)
            counts = f"{self._bad_reads} of {self._reads} reads met one of {len(self.bad_clips)} bad clips"
        if too_many:
            raise UserError(
                f"{counts}, more than max_bad_rate = {self.max_bad_rate}; last: {path} ({error}). "
                "Bring the files back or raise dataset.max_bad_rate to go on; a table without them (`dataset meta`) "
                "needs another workdir"
            )

    def _clip(self, sample_id: int) -> Clip:
        shard = self.shards[sample_id].as_py()
        return self._shard_reader.read(shard, int(self.records[sample_id])) if shard else str(self.paths[sample_id])


class _ClipCache:
    """The most recently used clips, up to a number of bytes; thread-safe."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.bytes = 0
        self._clips: OrderedDict[tuple, Frames] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple) -> Frames | None:
        with self._lock:
            if key in self._clips:
                self._clips.move_to_end(key)
            return self._clips.get(key)

    def put(self, key: tuple, clip: Frames) -> None:
        with self._lock:
            if key in self._clips or clip.nbytes > self.max_bytes:
                return
            self._clips[key] = clip
            self.bytes += clip.nbytes
            while self.bytes > self.max_bytes:
                self.bytes -= self._clips.popitem(last=False)[1].nbytes
