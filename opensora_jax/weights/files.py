"""Checkpoint files: safetensors, alone or in shards, opened lazily and written atomically.

A tensor is read from disk only when it is asked for: opening the weights of an 11B model costs nothing.
"""

import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from opensora_jax.config.build import build
from opensora_jax.config.errors import UserError

Config = TypeVar("Config")


class LazyTensor:
    """A tensor in a file: `shape` is known, `np.asarray` reads it (bfloat16 as an ml_dtypes array)."""

    def __init__(self, file: safe_open, key: str):
        self._file, self._key = file, key
        self.shape = tuple(file.get_slice(key).get_shape())

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """Read the tensor from the file."""
        return np.asarray(self._file.get_tensor(self._key), dtype=dtype)


def open_checkpoint(path: str | Path) -> Mapping[str, LazyTensor]:
    """Returns key -> tensor of a .safetensors file, of an index of shards, or of a folder that holds either.

    Raises: UserError for a path that is missing, damaged or of another kind.
    """
    path = Path(path)
    if path.is_dir():
        path = _in_folder(path)
    if path.name.endswith(".index.json"):
        return _open_shards(path)
    if path.suffix != ".safetensors":
        raise UserError(
            f"{path} is no checkpoint that can be read; give a .safetensors file, an index, or their folder."
        )
    return _open_file(path)


def save_safetensors(path: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write all tensors into one file, which appears complete or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({key: np.asarray(value, order="C") for key, value in tensors.items()}, unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_config(folder: str | Path, cls: type[Config]) -> Config:
    """Returns the dataclass `cls` filled from a Hugging Face `config.json`, or from the `text_config` in it.

    Raises: UserError naming the file for one that is missing, damaged, incomplete or of an unsupported model.
    """
    path = Path(folder) / "config.json"
    fields = _read_json(path)
    fields = fields.get("text_config", fields)
    return build(cls, {name: fields[name] for name in inspect.signature(cls).parameters if name in fields}, str(path))


def _in_folder(folder: Path) -> Path:
    for pattern in ("*.safetensors.index.json", "model.safetensors", "*.safetensors"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(file.name for file in found[:3])
            raise UserError(f"{folder} holds {len(found)} checkpoints ({names}, ...); give the path of one of them.")
    raise UserError(f"{folder} holds no .safetensors file; give a folder with model.safetensors or its shards.")


def _open_shards(index: Path) -> dict[str, LazyTensor]:
    shard_of = _read_json(index).get("weight_map", {})
    if not shard_of:
        raise UserError(f"{index} lists no tensors under weight_map; download it again.")
    shards = {name: _open_file(index.parent / name) for name in sorted(set(shard_of.values()))}
    lost = [key for key, name in shard_of.items() if key not in shards[name]]
    if lost:
        raise UserError(f"{index} promises {lost[0]} in {shard_of[lost[0]]}, which lacks it; download both again.")
    return {key: shards[name][key] for key, name in shard_of.items()}


def _open_file(path: Path) -> dict[str, LazyTensor]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; check the path or download the weights.")
    try:
        file = safe_open(path, framework="numpy")
        return {key: LazyTensor(file, key) for key in file.keys()}  # noqa: SIM118 - no iterator of its own
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); download or write it again.") from error


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise UserError(f"{path} does not exist; check the path or download the weights.")
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); download or write it again.") from error
