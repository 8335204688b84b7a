"""A data set of TFDS in the making: shards that are finished one by one, and what makes them a data set, last.

TFDS's builders write all clips twice or hold a shard in memory, and start over after a crash. So only their parts are
used: the names of files, features.json and dataset_info.json. The result is read by `tfds.builder_from_directory`.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from opensora_jax.config.errors import UserError
from opensora_jax.config.files import is_unfinished, only_one, sweep, write_json
from opensora_jax.data.shards.shards import FORMAT

SPLIT = "train"
INFO = "dataset_info.json"  # a folder without it is no data set to TFDS
ABOUT = "shards.json"  # what the shards are made of
NOTES = "notes"  # a file for each finished shard


@dataclass(frozen=True)
class TfdsFolder:
    """A folder for `shards` shards; `key` is a hash of what they are made of."""

    folder: Path
    name: str
    key: str
    shards: int

    @property
    def template(self) -> tfds.core.ShardedFileTemplate:
        """The rule by which TFDS names its files."""
        return tfds.core.ShardedFileTemplate(
            data_dir=self.folder, dataset_name=self.name, split=SPLIT, filetype_suffix=FORMAT
        )

    def path(self, shard: int) -> Path:
        """Returns the file of a shard."""
        return Path(self.template.sharded_filepath(shard_index=shard, num_shards=self.shards))

    def claim(self) -> None:
        """Starts the folder or continues it. Raises: UserError if it holds something else."""
        about = self.folder / ABOUT
        if about.is_file():
            if json.loads(about.read_text(encoding="utf-8"))["key"] != self.key:
                other = "holds shards of another table, name or size of shards"
                raise UserError(f"{self.folder} {other}: choose another --output, or delete it.")
        elif self.folder.exists() and not all(is_unfinished(path.name) for path in self.folder.iterdir()):
            raise UserError(f"{self.folder} holds other things than shards: choose another --output.")
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(about, {"key": self.key, "shards": self.shards})
        (self.folder / NOTES).mkdir(exist_ok=True)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keeps other processes out while the block runs; what killed ones left is removed. Raises: UserError."""
        with only_one(self.folder / NOTES / "lock"):
            sweep(self.folder)
            yield

    def note(self, shard: int, **facts: Any) -> None:
        """Marks a shard, whose file is whole, as finished."""
        write_json(self._note(shard), {"size_bytes": self.path(shard).stat().st_size} | facts)

    def noted(self, shard: int) -> dict[str, Any] | None:
        """Returns what was noted of a shard, None if it is not finished."""
        try:
            note = json.loads(self._note(shard).read_text(encoding="utf-8"))
            return note if note["size_bytes"] == self.path(shard).stat().st_size else None
        except FileNotFoundError:
            return None

    def is_complete(self) -> bool:
        """Returns whether the folder is a data set."""
        return (self.folder / INFO).is_file()

    def reopen(self) -> None:
        """Makes the folder no data set, since shards of it are lost."""
        (self.folder / INFO).unlink(missing_ok=True)

    def complete(self, features: tfds.features.FeaturesDict, lengths: Sequence[int]) -> None:
        """Makes the folder a data set, with so many records in each shard."""
        identity = tfds.core.DatasetIdentity(self.name, tfds.core.Version("1.0.0"), str(self.folder), module_name="")
        info = tfds.core.DatasetInfo(builder=identity, features=features, description="Encoded clips with captions.")
        size = sum(self.path(shard).stat().st_size for shard in range(self.shards))
        split = tfds.core.SplitInfo(SPLIT, list(lengths), size, filename_template=self.template)
        info.set_file_format(FORMAT)
        info.set_splits(tfds.core.SplitDict([split]))
        staging = self.folder / NOTES / "tfds"
        staging.mkdir(exist_ok=True)
        info.write_to_directory(staging)
        for path in sorted(staging.iterdir(), key=lambda path: path.name == INFO):
            os.replace(path, self.folder / path.name)
        staging.rmdir()

    def _note(self, shard: int) -> Path:
        return self.folder / NOTES / f"{shard:05d}.json"
