"""A cache of autoencoder latents and text embeddings, so that the encoders run once and not in every epoch.

A folder holds two ArrayRecord files (random access, one safetensors blob per record), an index with one row
per latent, and a description written last. It is built beside its final name and renamed when complete; its
key, a hash of the encoders' weights and configs, refuses a cache of other encoders.
"""

import errno
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Float, Float32

from opensora_jax.config.errors import UserError
from opensora_jax.data.buckets import Assignment, Bucket, Table, Unassigned

VERSION = 1
RECORD_OPTIONS = "group_size:1,uncompressed"  # larger groups read slowly at random; float32 noise does not compress
BUCKET_FIELDS = ("resolution", "aspect_ratio", "num_frames", "height", "width")
INDEX_SCHEMA = pa.schema(
    [
        ("sample_id", pa.int64()),
        ("path", pa.string()),
        ("caption", pa.string()),
        ("text_id", pa.int64()),
        ("fps", pa.float32()),
        ("resolution", pa.string()),
        ("aspect_ratio", pa.string()),
        ("num_frames", pa.int64()),
        ("height", pa.int64()),
        ("width", pa.int64()),
    ]
)


class LatentWriter:
    """Builds a cache in `<folder>.tmp`, which `finish` renames; what a killed run left there is deleted."""

    def __init__(self, folder: str | Path, key: str):
        self.folder, self.key = Path(folder), key
        if self.folder.exists():
            raise UserError(f"{folder} exists; delete it or choose another folder for the latents")
        self.building = self.folder.with_name(self.folder.name + ".tmp")
        if self.building.exists():
            shutil.rmtree(self.building)
        self.building.mkdir(parents=True)
        self._texts = Records(self.building / "texts.array_record")
        self._latents = Records(self.building / "latents.array_record")
        self._captions: dict[str, int] = {}
        self._rows: list[dict[str, Any]] = []
        self._shapes: dict[Any, tuple[int, ...]] = {}

    def add_text(self, text: str, embedding: Float[np.ndarray, "S D"], pooled: Float[np.ndarray, " P"]) -> int:
        """Returns the id of the caption, which is written only once; "" is the null text."""
        if text not in self._captions:
            self._check_shape("text embeddings", embedding)
            self._check_shape("pooled text embeddings", pooled)
            self._texts.write(text=embedding, pooled=pooled)
            self._captions[text] = len(self._captions)
        return self._captions[text]

    def add_latent(
        self,
        sample_id: int,
        bucket: Bucket,
        latent: Float[np.ndarray, "T H W C"],
        text_id: int,
        fps: float | int,
        path: str = "",
    ) -> None:
        """Adds the latent of a clip; fps is that of its frames (NaN for images), path is only a note."""
        if not 0 <= text_id < len(self._captions):
            raise ValueError(f"text_id {text_id} of {len(self._captions)} texts: add the text first")
        self._check_shape(bucket, latent)
        self._latents.write(latent=latent)
        row = {"sample_id": sample_id, "path": path, "text_id": text_id, "fps": fps}
        self._rows.append(row | {name: asdict(bucket)[name] for name in BUCKET_FIELDS})

    def finish(self) -> Path:
        """Returns the folder of the complete cache."""
        self._texts.close()
        self._latents.close()
        captions = list(self._captions)
        rows = [row | {"caption": captions[row["text_id"]]} for row in self._rows]
        pq.write_table(pa.Table.from_pylist(rows, INDEX_SCHEMA), self.building / "index.parquet")
        about = {"version": VERSION, "key": self.key, "latents": len(self._rows), "texts": self._captions}
        (self.building / "cache.json").write_text(json.dumps(about, ensure_ascii=False, indent=1), encoding="utf-8")
        os.replace(self.building, self.folder)
        return self.folder

    def _check_shape(self, kind: Any, array: np.ndarray) -> None:
        expected = self._shapes.setdefault(kind, array.shape)
        if array.shape != expected:
            raise ValueError(f"{kind}: all have one shape in a cache: {expected} before, now {array.shape}")


class LatentCache:
    """A finished cache, read from any thread; UserError if it is missing or has another key (None: any)."""

    def __init__(self, folder: str | Path, key: str | None):
        self.folder = Path(folder)
        try:
            about = json.loads((self.folder / "cache.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{folder} holds no finished latents; make them with `dataset encode`") from None
        if about["version"] != VERSION:
            raise UserError(f"{folder} has cache version {about['version']}, not {VERSION}; encode again")
        if key is not None and about["key"] != key:
            raise UserError(
                f"{folder} is from other encoders (key {about['key']}, now {key}); delete it and encode again"
            )
        self.key: str = about["key"]
        self.captions: dict[str, int] = about["texts"]
        self.index: pa.Table = pq.read_table(self.folder / "index.parquet")
        self._latents = ArrayRecordDataSource(str(self.folder / "latents.array_record"))
        self._texts = ArrayRecordDataSource(str(self.folder / "texts.array_record"))
        self._text_ids = self.index["text_id"].to_numpy()
        self._fps = self.index["fps"].to_numpy()
        if (len(self._latents), len(self._texts)) != (len(self.index), len(self.captions)):
            raise UserError(f"{folder} is damaged: its index and its records differ; delete it and encode again")

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def null_text(self) -> dict[str, Float32[np.ndarray, "..."]]:
        """The embeddings of "": text [S, D] and pooled [P]. Raises UserError if the cache has none."""
        if "" not in self.captions:
            raise UserError(f'{self.folder} has no embedding of the empty text ""; encode again')
        return self.read_text(self.captions[""])

    def read_text(self, text_id: int) -> dict[str, Float32[np.ndarray, "..."]]:
        """Returns text [S, D] and pooled [P] of a caption."""
        return safetensors.numpy.load(self._texts[text_id])

    def read(self, row: int) -> dict[str, Float32[np.ndarray, "..."]]:
        """Returns latent [T, H, W, C], text [S, D], pooled [P] and fps [] of a row of the index."""
        latent = safetensors.numpy.load(self._latents[row])
        return latent | self.read_text(int(self._text_ids[row])) | {"fps": np.asarray(self._fps[row])}


class CachedBuckets:
    """Sorts the rows of `LatentCache.index` for a Plan; only the batch sizes come from bucket_config.

    Probabilities do nothing here: they chose the rows when the cache was made.
    """

    def __init__(self, bucket_config: Mapping[str, Any]):
        self.batch_sizes = {
            (resolution, frames): line[1]
            for resolution, lines in bucket_config.items()
            for frames, line in lines.items()
        }

    def assign(self, table: Table, *, seed: int) -> Assignment:
        """Returns the bucket of every row, whatever the seed. Raises UserError if bucket_config has none."""
        del seed
        columns = [np.asarray(table[name]).tolist() for name in BUCKET_FIELDS]
        shapes = list(zip(*columns, strict=True))
        buckets = {
            (name, ratio, frames, h, w): Bucket(name, ratio, frames, h, w, self.batch_sizes[name, frames])
            for name, ratio, frames, h, w in sorted(set(shapes))
            if (name, frames) in self.batch_sizes
        }
        if not buckets:
            cached = ", ".join(sorted({f"{shape[0]} with {shape[2]} frames" for shape in shapes})) or "nothing"
            raise UserError(f"the latents hold {cached}: bucket_config has no such line; change it or encode again")
        place = {shape: i for i, shape in enumerate(buckets)}
        found = np.array([place.get(shape, -1) for shape in shapes], np.int64)
        missing = int((found < 0).sum())
        reason = Unassigned("in no line of bucket_config", missing, "", "add lines")
        return Assignment(found, tuple(buckets.values()), (reason,) if missing else ())


class Records:
    """Writes arrays as float32 safetensors blobs, with the disk's errors as OSError."""

    def __init__(self, path: Path):
        self.path = path
        self._writer = ArrayRecordWriter(str(path), RECORD_OPTIONS)

    def write(self, **arrays: np.ndarray) -> None:
        blob = safetensors.numpy.save({k: np.ascontiguousarray(v, np.float32) for k, v in arrays.items()})
        self._guarded(self._writer.write, blob)

    def close(self) -> None:
        self._guarded(self._writer.close)

    def _guarded(self, action: Any, *arguments: Any) -> None:
        try:
            action(*arguments)
        except RuntimeError as error:
            number = errno.ENOSPC if "No space left" in str(error) else errno.EIO
            raise OSError(number, str(error), str(self.path)) from error
