"""A cache of autoencoder latents and text embeddings, so that the encoders run once and not in every epoch.

`cache.json` says what the cache is made of and into how many shards it is divided (`array_shards.py`): `latents-*`,
whose indexes have a row for every latent, and `texts-*` with each distinct text once, the empty one first. It is
complete when all its shards are, so that processes which share the work need nothing but the folder.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from opensora_jax.config.errors import UserError
from opensora_jax.config.files import write_json
from opensora_jax.data.cache.array_shards import ArrayReader, ArrayShards, ShardInfo
from opensora_jax.data.cache.cache_key import Identity
from opensora_jax.data.plan.buckets import Assignment, Bucket
from opensora_jax.data.plan.fit import Table, parse_line
from opensora_jax.data.plan.reasons import EmptyLine, Unassigned
from opensora_jax.data.shards.record_files import RecordError

VERSION = 2
BUCKET_FIELDS = ("resolution", "aspect_ratio", "num_frames", "height", "width")
NO_TEXT = -1
INDEX_SCHEMA = pa.schema(
    [
        ("sample_id", pa.int64()),  # row of the table
        ("path", pa.string()),
        ("text_id", pa.int64()),  # place among the texts, or NO_TEXT
        ("fps", pa.float32()),  # of the file, NaN for images
        ("resolution", pa.string()),
        ("aspect_ratio", pa.string()),
        ("num_frames", pa.int64()),
        ("height", pa.int64()),
        ("width", pa.int64()),
    ]
)
TEXT_SCHEMA = pa.schema([("text", pa.large_string())])


@dataclass(frozen=True)
class Origin:
    """What lets training see whether a cache is still that of a config, without running the encoders.

    Lines of the bucket_config that chose the rows, each [resolution, frames, line], and the seed that did; stamps of
    the encoders' weights by the names of their digests. All is empty in caches of earlier versions.
    """

    lines: list[list[Any]] = field(default_factory=list)
    seed: int = 0
    stamps: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, bucket_config: Mapping[str, Any], seed: int, stamps: Mapping[str, str]) -> "Origin":
        """Returns what is read back from a file: tuples are lists there."""
        lines = [(name, frames, line) for name, some in bucket_config.items() for frames, line in some.items()]
        return cls(json.loads(json.dumps(lines)), seed, dict(stamps))

    @property
    def bucket_config(self) -> dict[str, dict[int, Any]]:
        """The lines as a config has them."""
        found: dict[str, dict[int, Any]] = {}
        for name, frames, line in self.lines:
            found.setdefault(name, {})[frames] = line
        return found


@dataclass(frozen=True)
class CacheInfo:
    """What cache.json says; `command` is the one that makes the cache, `texts` is 0 for latents alone."""

    command: str
    identity: Identity
    dtype: str  # of the stored values
    clips: int
    shard_clips: int
    texts: int
    shard_texts: int
    origin: Origin = Origin()

    def shards(self, folder: Path) -> tuple[ArrayShards, ArrayShards]:
        """Returns the shards of the latents and those of the texts."""
        return (
            ArrayShards(folder, "latents", self.clips, self.shard_clips, self.dtype),
            ArrayShards(folder, "texts", self.texts, self.shard_texts, self.dtype),
        )

    def write(self, folder: Path) -> None:
        """Writes cache.json."""
        latents, texts = self.shards(folder)
        counts = {"latent_shards": len(latents), "text_shards": len(texts)}  # for who reads the file itself
        write_json(folder / "cache.json", {"version": VERSION, "key": self.identity.key} | counts | asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "CacheInfo | None":
        """Returns what is there, None without a cache.json. Raises: UserError for one of another version."""
        try:
            found = json.loads((folder / "cache.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as error:
            raise UserError(f"{folder}/cache.json is damaged ({error}); delete {folder} and encode again") from None
        if found["version"] != VERSION:
            raise UserError(f"{folder} has cache version {found['version']}, not {VERSION}; delete it and encode again")
        parts: dict[str, Any] = {"identity": Identity(**found["identity"]), "origin": Origin(**found.get("origin", {}))}
        return cls(**{name: found[name] for name in cls.__dataclass_fields__ if name not in parts}, **parts)


def other_things(folder: Path, differences: str, command: str) -> UserError:
    """Returns the error for a cache that is not what is asked for."""
    return UserError(
        f"{folder} is made of other things: {differences}; delete it and run `{command}` again, or give another folder"
    )


class LatentCache:
    """A complete cache, read from any thread. Raises: UserError if it is missing, unfinished or damaged."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        info = CacheInfo.read(self.folder)
        if info is None:
            raise UserError(f"{folder} holds no latents; make them with `dataset encode`")
        self.info, self.key = info, info.identity.key
        self._latent_shards, self._text_shards = info.shards(self.folder)
        shards = self._finished(self._latent_shards)
        self.left_out: list[tuple[str, str]] = [  # (path, reason) of clips without a latent
            (path, reason) for shard in shards for path, reason in shard.notes.get("left_out", [])
        ]
        self._latents = ArrayReader(self._latent_shards, shards)
        self._texts = ArrayReader(self._text_shards, self._finished(self._text_shards))
        self.index: pa.Table = self._latent_shards.index()
        self._text_ids = self.index["text_id"].to_numpy()
        self._fps = self.index["fps"].to_numpy()

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def captions(self) -> pa.ChunkedArray:
        """The texts by their ids."""
        return self._text_shards.index()["text"]

    @cached_property
    def null_text(self) -> dict[str, Float[np.ndarray, "..."]]:
        """The embeddings of "": text [S, D] and pooled [P]."""
        return self.read_text(0)

    def read_text(self, text_id: int) -> dict[str, Float[np.ndarray, "..."]]:
        """Returns text [S, D] and pooled [P] of a caption. Raises: UserError for a cache of latents alone."""
        if not self.info.texts:
            raise UserError(f"{self.folder} has latents but no texts: make it with `dataset encode`, not `vae encode`")
        return self._read(self._texts, text_id)

    def read_latent(self, row: int) -> Float[np.ndarray, "T H W C"]:
        """Returns the latent of a row of the index."""
        return self.read_clip(row)["latent"]

    def read_clip(self, row: int) -> dict[str, Float[np.ndarray, "_ H W C"]]:
        """Returns latent [T, H, W, C], and the "head" and "tail" of a clip, encoded alone, where they were wanted."""
        return self._read(self._latents, row)

    def read(self, row: int) -> dict[str, Float[np.ndarray, "..."]]:
        """Returns what `read_clip` does, and text [S, D], pooled [P] and fps [] of a row of the index."""
        texts = self.read_text(int(self._text_ids[row]))
        return self.read_clip(row) | texts | {"fps": np.asarray(self._fps[row])}

    def _read(self, reader: ArrayReader, number: int) -> dict[str, np.ndarray]:
        try:
            return reader.read(number)
        except RecordError as error:
            raise UserError(f"{error}: delete this file and run `{self.info.command}` again") from error

    def _finished(self, shards: ArrayShards) -> list[ShardInfo]:
        found = shards.info()
        finished = [info for info in found if info]
        if len(finished) < len(found):
            first = shards.records_path(found.index(None)).name
            raise UserError(
                f"{self.folder} is not complete: {len(found) - len(finished)} of its {len(found)} shards of "
                f"{shards.name} are missing or cut short (first: {first}); continue with `{self.info.command}`"
            )
        return finished


class CachedBuckets:
    """Sorts the rows of `LatentCache.index` for a Plan; only the batch sizes come from bucket_config.

    Probabilities do nothing here: they chose the rows when the cache was made. Raises UserError.
    """

    def __init__(self, bucket_config: Mapping[str, Any]):
        self.batch_sizes = {
            (resolution, frames): parse_line(resolution, frames, line)[2]
            for resolution, lines in bucket_config.items()
            for frames, line in lines.items()
        }

    def assign(self, table: Table, *, seed: int) -> Assignment:
        """Returns the bucket of every row, whatever the seed. Raises UserError if bucket_config has none."""
        del seed
        shapes, which = _distinct(table, BUCKET_FIELDS)
        buckets = {
            i: Bucket(name, ratio, frames, h, w, self.batch_sizes[name, frames])
            for i, (name, ratio, frames, h, w) in sorted(enumerate(shapes), key=lambda pair: pair[1])
            if (name, frames) in self.batch_sizes
        }
        lines = {(shape[0], shape[2]) for shape in shapes}
        if not buckets:
            cached = ", ".join(sorted(f"{name} with {frames} frames" for name, frames in lines)) or "nothing"
            raise UserError(f"the latents hold {cached}: bucket_config has no such line; change it or encode again")
        place = np.full(len(shapes), -1)
        place[list(buckets)] = np.arange(len(buckets))
        found = place[which]
        missing = int((found < 0).sum())
        reason = Unassigned("in no line of bucket_config", missing, "", "add lines")
        empty = tuple(EmptyLine(*line, "the latents hold none") for line in self.batch_sizes if line not in lines)
        return Assignment(found, tuple(buckets.values()), (reason,) if missing else (), empty)


def _distinct(table: Table, names: Sequence[str]) -> tuple[list[tuple], Int[np.ndarray, " N"]]:
    """Returns the distinct values of these columns taken together, and for every row the index of its own."""
    table = table if isinstance(table, pa.Table) else pa.table(dict(table))
    columns = [table[name].combine_chunks().dictionary_encode() for name in names]
    sizes = [max(len(column.dictionary), 1) for column in columns]
    codes = pa.array(np.ravel_multi_index([np.asarray(column.indices) for column in columns], sizes))
    codes = codes.dictionary_encode()
    places = np.unravel_index(np.asarray(codes.dictionary), sizes)
    values = [column.dictionary.take(pa.array(place)) for column, place in zip(columns, places, strict=True)]
    return list(zip(*(value.to_pylist() for value in values), strict=True)), np.asarray(codes.indices)
