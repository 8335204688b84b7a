"""Fills the folder of a latent cache (data/cache/latents.py), shard by shard, in any order and by several processes.

A folder with the shards of other weights, settings, captions or clips is refused, by naming what differs.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from opensora_jax.config.files import sweep
from opensora_jax.data.cache.array_shards import ShardWriter
from opensora_jax.data.cache.latents import (
    BUCKET_FIELDS,
    INDEX_SCHEMA,
    NO_TEXT,
    TEXT_SCHEMA,
    CacheInfo,
    other_things,
)
from opensora_jax.data.plan.buckets import Bucket


class LatentWriter:
    """Writes the shards that a cache still lacks: text number 0 is the empty one, the others are as the caller says.

    A folder with shards of the same identity is continued, in its own division into shards. Nothing is written before
    `start`. Raises: UserError when the folder holds shards of another identity.
    """

    def __init__(self, folder: str | Path, info: CacheInfo):
        self.folder = Path(folder)
        found = CacheInfo.read(self.folder)
        if found and found.identity != info.identity:
            if any(self.folder.glob("*.parquet")):
                raise other_things(self.folder, found.identity.differences(info.identity), info.command)
            found = None
        self.info = replace(found, origin=info.origin) if found else info
        self.latents, self.texts = self.info.shards(self.folder)
        self._shapes: dict[Any, tuple[int, ...]] = {}

    def start(self) -> None:
        """Makes the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if CacheInfo.read(self.folder) != self.info:
            self.info.write(self.folder)

    @contextmanager
    def writing_latents(self, shard: int) -> Iterator["LatentShard"]:
        """Gives what adds latents to a shard, which is finished when the block ends."""
        with self.latents.writing(shard, INDEX_SCHEMA) as writer:
            yield LatentShard(writer, self._shapes)

    @contextmanager
    def writing_texts(self, shard: int) -> Iterator["TextShard"]:
        """Gives what adds texts to a shard, which is finished when the block ends."""
        with self.texts.writing(shard, TEXT_SCHEMA) as writer:
            yield TextShard(writer, self._shapes)

    def sweep(self) -> None:
        """Deletes what killed runs left of shards, which are all there."""
        sweep(self.folder)


@dataclass(frozen=True)
class LatentShard:
    """Adds latents to a shard; those of a bucket have one shape."""

    writer: ShardWriter
    shapes: dict[Any, tuple[int, ...]]

    def add(
        self,
        sample_id: int,
        bucket: Bucket,
        latent: Float[np.ndarray, "T H W C"],
        references: Mapping[str, Float[np.ndarray, "1 H W C"]] | None = None,
        *,
        text_id: int = NO_TEXT,
        fps: float | int,
        path: str,
    ) -> None:
        """Adds the latent of a clip, and of its ends alone; fps and path are those of its file."""
        _check_shape(self.shapes, bucket, latent)
        row = {"sample_id": sample_id, "path": path, "text_id": text_id, "fps": fps}
        arrays = {"latent": latent} | dict(references or {})
        self.writer.add(row | {name: getattr(bucket, name) for name in BUCKET_FIELDS}, arrays)

    def leave_out(self, path: str, reason: str) -> None:
        """Notes a clip that has no latent."""
        self.writer.notes.setdefault("left_out", []).append([path, reason])


@dataclass(frozen=True)
class TextShard:
    """Adds texts to a shard, in their order."""

    writer: ShardWriter
    shapes: dict[Any, tuple[int, ...]]

    def add(self, text: str, embedding: Float[np.ndarray, "S D"], pooled: Float[np.ndarray, " P"]) -> None:
        """Adds the embeddings of a text."""
        for kind, array in ("text embeddings", embedding), ("pooled text embeddings", pooled):
            _check_shape(self.shapes, kind, array)
        self.writer.add({"text": text}, {"text": embedding, "pooled": pooled})


def _check_shape(shapes: dict[Any, tuple[int, ...]], kind: Any, array: np.ndarray) -> None:
    expected = shapes.setdefault(kind, array.shape)
    if array.shape != expected:
        raise ValueError(f"{kind}: all have one shape in a cache: {expected} before, now {array.shape}")
