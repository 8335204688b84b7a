"""Latents of a table's clips in files of a bounded size, written one after the other and continued after a crash.

A shard is an ArrayRecord of safetensors blobs with its index beside it; the index is written last, so a shard without
one is none. `latents.json` holds the key of what the latents depend on, and refuses to add others to them.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
from array_record.python.array_record_data_source import ArrayRecordDataSource
from jaxtyping import Float

from opensora_jax.config.errors import UserError
from opensora_jax.config.files import write_json
from opensora_jax.data.latents import Records


@dataclass(frozen=True)
class LatentShards:
    """The shards in a folder. Raises: UserError when it holds those of other weights, clips or settings."""

    folder: Path
    key: str

    def __post_init__(self):
        """Start the folder, or check that it is the same work."""
        self.folder.mkdir(parents=True, exist_ok=True)
        about = self.folder / "latents.json"
        if about.is_file() and json.loads(about.read_text())["key"] != self.key:
            raise UserError(
                f"{self.folder} holds the latents of other weights, clips or settings; give another save_dir, or "
                "remove it."
            )
        write_json(about, {"key": self.key})

    def is_finished(self, shard: int) -> bool:
        """Returns whether a shard is complete."""
        return self._index(shard).is_file()

    def write(
        self, shard: int, rows: Sequence[dict[str, Any]], latents: Sequence[Float[np.ndarray, "T H W C"]]
    ) -> None:
        """Writes a shard: a latent for each row, which says what it is the latent of."""
        unfinished = self._records(shard).with_suffix(".tmp")
        records = Records(unfinished)
        for latent in latents:
            records.write(latent=latent)
        records.close()
        os.replace(unfinished, self._records(shard))
        index = self._index(shard).with_suffix(".tmp")
        pq.write_table(pa.Table.from_pylist(list(rows)), index)
        os.replace(index, self._index(shard))

    def index(self) -> pa.Table:
        """Returns what every latent is the latent of, with its `shard` and its `record` there."""
        parts = []
        for path in sorted(self.folder.glob("latents-*.parquet")):
            part = pq.read_table(path)
            shard = int(path.stem.split("-")[1])
            parts.append(
                part.append_column("shard", pa.array([shard] * len(part))).append_column(
                    "record", pa.array(range(len(part)))
                )
            )
        if not parts:
            raise UserError(f"{self.folder} holds no finished shard of latents; run `vae encode` to its end.")
        return pa.concat_tables(parts)

    def read(self, shard: int, record: int) -> Float[np.ndarray, "T H W C"]:
        """Returns a latent."""
        with ArrayRecordDataSource(str(self._records(shard))) as source:
            return safetensors.numpy.load(source[record])["latent"]

    def _records(self, shard: int) -> Path:
        return self.folder / f"latents-{shard:05d}.array_record"

    def _index(self, shard: int) -> Path:
        return self.folder / f"latents-{shard:05d}.parquet"
