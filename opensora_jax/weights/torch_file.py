"""PyTorch checkpoints (.pt, .pth, .bin, .ckpt) without PyTorch: the tensors of a state dict, left in their file.

Since PyTorch 1.6 a checkpoint is a zip archive of uncompressed entries, a pickle and one entry per storage. Before, it
was a row of pickles and then the storages, each after its count. Either way a storage is a run of bytes in the file, so
that nothing but the pickle is read here; `torch_pickle` sees to it that none of it is executed.
Source: torch/serialization.py (_save, _legacy_save), the zip format's APPNOTE 4.3.7.
"""

import mmap
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from opensora_jax.config.errors import UserError
from opensora_jax.weights.tensor import FileTensor
from opensora_jax.weights.torch_names import ForbiddenName, Storage, StoredTensor
from opensora_jax.weights.torch_pickle import read_pickle

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
LFS_POINTER = b"version https://git-lfs"
ZIP = b"PK\x03\x04"


class Place(NamedTuple):
    """Where a storage lies in the file, in bytes."""

    start: int
    nbytes: int


def open_torch(path: Path, *, part: str | None = None) -> dict[str, FileTensor]:
    """Returns key -> tensor of the state dict in a file that torch.save wrote.

    The state dict is the one dict with tensors in what was saved, or else that itself; `part` names which, if there
    are more.
    Raises: UserError for a file that is missing, damaged, of another kind, or that holds more than weights.
    """
    try:
        saved, places = _read(path)
        return {key: _in_file(path, tensor, places) for key, tensor in _state_dict(path, saved, part).items()}
    except ForbiddenName as error:
        raise UserError(
            f"{path} names {str(error)[:80]!r}, and only weights are read, no other Python objects; where you trust "
            "the file, load it with PyTorch and save model.state_dict() alone, as safetensors."
        ) from error
    except (ValueError, OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise UserError(
            f"{path} is not a whole PyTorch checkpoint ({_line(error)}); download or save it again."
        ) from error


def _read(path: Path) -> tuple[Any, dict[str, Place]]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; check the path or download the weights.")
    if not path.stat().st_size:
        raise ValueError("it is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
        if stream[: len(LFS_POINTER)] == LFS_POINTER:
            raise UserError(f"{path} is a git-lfs pointer to the weights; run `git lfs pull` in its repository.")
        return _read_zip(path, stream) if stream[: len(ZIP)] == ZIP else _read_legacy(stream)


def _read_zip(path: Path, stream: mmap.mmap) -> tuple[Any, dict[str, Place]]:
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
    if "constants.pkl" in entries:
        raise UserError(f"{path} is a TorchScript program; save torch.jit.load(...).state_dict() of it instead.")
    if "data.pkl" not in entries:
        raise ValueError("it is a zip archive without data.pkl")
    places = {name: _place(stream, entry) for name, entry in entries.items()}
    order = places.get("byteorder", Place(0, 0))  # files of older versions are little-endian
    if stream[order.start : order.start + order.nbytes] == b"big":
        raise ValueError("its numbers are big-endian")
    stream.seek(places["data.pkl"].start)
    saved = read_pickle(stream, {})
    return saved, {name.removeprefix("data/"): place for name, place in places.items() if name.startswith("data/")}


def _place(stream: mmap.mmap, entry: zipfile.ZipInfo) -> Place:
    """Returns where the bytes of an entry are, which its local header says: the directory's copy may differ in size."""
    header = stream[entry.header_offset : entry.header_offset + 30]
    encrypted = entry.flag_bits & 1
    if not header.startswith(ZIP) or len(header) < 30 or entry.compress_type != zipfile.ZIP_STORED or encrypted:
        raise ValueError(f"its entry {entry.filename} is damaged, compressed or encrypted")
    start = entry.header_offset + len(header) + sum(struct.unpack("<HH", header[26:]))  # a name, an extra field
    if not 0 <= start <= len(stream) - entry.file_size:
        raise ValueError(f"it ends before its entry {entry.filename}")
    return Place(start, entry.file_size)


def _read_legacy(stream: mmap.mmap) -> tuple[Any, dict[str, Place]]:
    if stream[:1] != b"\x80" or read_pickle(stream, {}) != MAGIC or read_pickle(stream, {}) != PROTOCOL:
        raise ValueError("it does not begin as those do")
    system = read_pickle(stream, {})
    storages: dict[str, Storage] = {}
    if not isinstance(system, dict) or not system.get("little_endian"):
        raise ValueError("its numbers are big-endian")
    saved = read_pickle(stream, storages)
    return saved, _after_counts(stream, read_pickle(stream, {}), storages)


def _after_counts(stream: mmap.mmap, keys: Any, storages: Mapping[str, Storage]) -> dict[str, Place]:
    """Returns the places of storages that follow one another, each after the number of its values as int64."""
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in storages for key in keys):
        raise ValueError("its list of storages does not fit its pickle")
    places: dict[str, Place] = {}
    at = stream.tell()
    for key in keys:
        count = int.from_bytes(stream[at : at + 8], "little", signed=True)
        places[key] = Place(at + 8, count * storages[key].dtype.itemsize)
        at = places[key].start + places[key].nbytes
        if count < 0 or at > len(stream):
            raise ValueError("it ends before its last tensor")
    return places


def _state_dict(path: Path, saved: Any, part: str | None) -> dict[str, StoredTensor]:
    if not isinstance(saved, dict):
        raise UserError(f"{path} holds a {type(saved).__name__}; save a state dict: names and their tensors.")
    parts = {name: found for name, value in saved.items() if (found := _tensors(value))}
    if part is not None and part not in parts:
        raise UserError(f"{path} has no part {part!r} with tensors; the parts with tensors are: {_listed(parts)}.")
    if part is not None:
        return parts[part]
    if len(parts) > 1:
        example = f"part={next(iter(parts))!r}"
        raise UserError(f"{path} has tensors in several parts: {_listed(parts)}; say which by {example}.")
    # Beside a part, tensors at the top are the state of a random generator and the like.
    tensors = next(iter(parts.values()), None) or _tensors(saved)
    if not tensors:
        raise UserError(f"{path} holds no tensors under names; give the file of a state dict.")
    return tensors


def _listed(parts: Mapping[Any, Any]) -> str:
    return ", ".join(repr(name)[:80] for name in parts) or "none"


def _tensors(value: Any) -> dict[str, StoredTensor]:
    if not isinstance(value, dict):
        return {}
    return {key: tensor for key, tensor in value.items() if isinstance(key, str) and isinstance(tensor, StoredTensor)}


def _in_file(path: Path, tensor: StoredTensor, places: Mapping[str, Place]) -> FileTensor:
    storage = tensor.storage
    if storage.key not in places or storage.start + storage.nbytes > places[storage.key].nbytes:
        raise ValueError(f"it lacks the bytes of its storage {storage.key}")
    offset = places[storage.key].start + storage.start + tensor.offset
    return FileTensor(path, offset, tensor.dtype, tensor.shape, tensor.strides)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
