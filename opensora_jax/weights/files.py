"""Checkpoint files: opened lazily whatever wrote them, and written atomically, one tensor in memory at a time.

A tensor, or a part of one, is read from disk only when it is asked for: opening the weights of an 11B model costs
nothing, and a device that holds an eighth of a matrix reads an eighth of it.
"""

import inspect
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from opensora_jax.config.build import build
from opensora_jax.config.errors import UserError
from opensora_jax.config.files import replacing
from opensora_jax.weights.tensor import FileTensor
from opensora_jax.weights.torch_file import open_torch

Config = TypeVar("Config")

SAFETENSORS = (".safetensors",)
INDEX = ".index.json"  # of shards
TORCH = (".pt", ".pth", ".bin", ".ckpt")
DTYPES = {  # names in the header of a safetensors file
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


def open_checkpoint(path: str | Path, *, part: str | None = None) -> Mapping[str, FileTensor]:
    """Returns key -> tensor of a .safetensors or torch file, of an index of shards, or of a folder with one of them.

    `part` names the state dict to take from a torch file with several, such as "model" and "ema".
    Raises: UserError for a path that is missing, damaged or of another kind.
    """
    path = Path(path)
    if path.is_dir():
        path = _in_folder(path)
    if path.name.endswith(INDEX):
        return _open_shards(path, part)
    return _open_file(path, part)


def save_safetensors(
    path: str | Path, tensors: Mapping[str, Any], *, wrote: Callable[[str], object] = lambda key: None
) -> None:
    """Write all tensors into one file, which appears complete or not at all; `wrote(key)` is called after each.

    A value has `shape` and `dtype` and is read with `np.asarray` when its turn comes, so a mapping of lazy tensors
    needs the memory of one of them. Raises: TypeError for a dtype that the format does not have.
    """
    path = Path(path)
    # Large items first, so that every tensor is aligned in the file.
    order = sorted(tensors, key=lambda key: -np.dtype(tensors[key].dtype).itemsize)
    header = _header({key: tensors[key] for key in order})
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for key in order:
            file.write(np.ascontiguousarray(tensors[key]).reshape(-1).view(np.uint8).data)
            wrote(key)


def read_config(folder: str | Path, cls: type[Config]) -> Config:
    """Returns the dataclass `cls` filled from a Hugging Face `config.json`, or from the `text_config` in it.

    Raises: UserError naming the file for one that is missing, damaged, incomplete or of an unsupported model.
    """
    path = Path(folder) / "config.json"
    fields = read_json(path)
    fields = fields.get("text_config", fields)
    return build(cls, {name: fields[name] for name in inspect.signature(cls).parameters if name in fields}, str(path))


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file. Raises: UserError for one that is missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; check the path or download the weights.")
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); download or write it again.") from error


def _in_folder(folder: Path) -> Path:
    """Returns the one checkpoint in a folder, safetensors before torch files and an index before its shards."""
    kinds = ("*.safetensors.index.json", "model.safetensors", "*.safetensors", "*.bin.index.json")
    for pattern in (*kinds, "pytorch_model.bin", *(f"*{suffix}" for suffix in TORCH)):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(file.name for file in found[:3])
            raise UserError(f"{folder} holds {len(found)} checkpoints ({names}, ...); give the path of one of them.")
    inner = [name for name in ("model", "ema") if (folder / name).is_dir()]  # as the original's training writes them
    hint = f"give {folder / inner[0]}" if inner else "give a folder with model.safetensors or its shards"
    raise UserError(f"{folder} holds no checkpoints and no file of weights ({', '.join(SAFETENSORS + TORCH)}); {hint}.")


def read_index(index: Path) -> dict[str, str]:
    """Returns key -> file of an index of shards. Raises: UserError for one that lists nothing."""
    shard_of = read_json(index).get("weight_map", {})
    if not shard_of:
        raise UserError(f"{index} lists no tensors under weight_map; download it again.")
    return shard_of


def _open_shards(index: Path, part: str | None) -> dict[str, FileTensor]:
    shard_of = read_index(index)
    shards = {name: _open_file(index.parent / name, part) for name in sorted(set(shard_of.values()))}
    lost = [key for key, name in shard_of.items() if key not in shards[name]]
    if lost:
        raise UserError(f"{index} promises {lost[0]} in {shard_of[lost[0]]}, which lacks it; download both again.")
    return {key: shards[name][key] for key, name in shard_of.items()}


def _open_file(path: Path, part: str | None) -> dict[str, FileTensor]:
    if path.suffix not in SAFETENSORS + TORCH:
        raise UserError(
            f"{path} is no file of weights; give one that ends in {', '.join(SAFETENSORS + TORCH)}, an index of "
            "shards (.index.json), or their folder."
        )
    if not path.is_file():
        raise UserError(f"{path} does not exist; check the path or download the weights.")
    if path.suffix in TORCH:
        return open_torch(path, part=part)
    if part is not None:
        raise UserError(f"{path} has no parts, as torch files may have: leave part={part!r} out.")
    return _open_safetensors(path)


def _open_safetensors(path: Path) -> dict[str, FileTensor]:
    try:
        with safe_open(path, framework="numpy"):  # checks the header, and the file's length against it
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); download or write it again.") from error
    with path.open("rb") as file:
        start = 8 + (size := int.from_bytes(file.read(8), "little"))
        entries = json.loads(file.read(size))
    entries.pop("__metadata__", None)
    strange = {entry["dtype"] for entry in entries.values()} - DTYPES.keys()
    if strange:
        raise UserError(f"{path} holds tensors of {min(strange)}; save them as one of {', '.join(DTYPES)}.")
    return {
        key: FileTensor(path, start + entry["data_offsets"][0], np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"]))
        for key, entry in entries.items()
    }


def _header(tensors: Mapping[str, Any]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers wants to know
    offset = 0
    for key, tensor in tensors.items():
        dtype = np.dtype(tensor.dtype)
        if dtype not in NAMES:
            raise TypeError(f"{key} is of {dtype}, which a safetensors file cannot hold")
        end = offset + math.prod(tensor.shape) * dtype.itemsize
        entries[key] = {"dtype": NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    return header.ljust(-(-len(header) // 8) * 8)
