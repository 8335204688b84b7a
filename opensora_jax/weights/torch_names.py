"""What a PyTorch checkpoint may name, and what stands for it here: descriptions of storages and of tensors in them.

All else is refused, so a name in a file never leads to an import. What a function here is called with comes from a file
and may be of any type: whatever a tensor is built of is checked first.
Source: torch/_utils.py (_rebuild_*), torch/serialization.py (persistent_id: storages), torch/storage.py (their dtypes).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import ml_dtypes
import numpy as np

MOST_AXES = 32
LARGEST = 2**63 - 1


class ForbiddenName(Exception):  # noqa: N818 - says what was met, as the message does
    """The pickle names something that is no part of a tensor; the text is the name."""


@dataclass(frozen=True)
class Storage:
    """Bytes of the file that tensors lie in: `nbytes` of them from `start` in the entry `key`."""

    key: str
    dtype: np.dtype
    start: int
    nbytes: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a view of a storage; `offset` and `strides` are in bytes."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def meaning(name: str) -> Any:
    """Returns what stands for a name. Raises: ForbiddenName for all names but those of the tables below."""
    if name not in _NAMES:
        raise ForbiddenName(name)
    return _NAMES[name]


def call(function: Any, arguments: Any) -> Any:
    """Returns what a function among the meanings makes of arguments; ValueError for anything but those functions."""
    if not isinstance(function, FunctionType):
        raise ValueError("it calls what cannot be called")
    return function(*arguments)


def fill(entries: list[Any], target: Any) -> None:
    """Set keys and values, which come in turn. Nested tuples are no keys: they can take for ever to hash."""
    keys, values = entries[::2], entries[1::2]
    if type(target) is not dict or not all(isinstance(key, str | int | float) for key in keys):
        raise ValueError("it holds a dict with keys that are neither text nor numbers")
    target.update(zip(keys, values, strict=True))


def storage_of(kind: Any, key: Any, location: Any, count: Any, view: Any = None) -> Storage:
    """Returns the storage of a reference; `view` is (key, first value, values), which old files may have."""
    _, start, count = (key, 0, count) if view is None else view
    if not (isinstance(kind, _StorageType) and isinstance(key, str) and _are_sizes(start, count)):
        raise ValueError("it refers to a storage that is none")
    return Storage(key, kind.dtype, start * kind.dtype.itemsize, count * kind.dtype.itemsize)


def _tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, gradient: Any = None, hooks: Any = None, metadata: Any = None
) -> StoredTensor:
    return _tensor_of_type(storage, offset, shape, strides, gradient, hooks, getattr(storage, "dtype", None), metadata)


def _tensor_of_type(
    storage: Any, offset: Any, shape: Any, strides: Any, gradient: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> StoredTensor:
    tuples = isinstance(shape, tuple) and isinstance(strides, tuple)
    if not (isinstance(storage, Storage) and isinstance(dtype, np.dtype) and tuples):
        raise ValueError("it describes a tensor by something else than a storage, a type and sizes")
    if not _are_sizes(offset, *shape, *strides):
        raise ValueError("it describes a tensor by values that are no sizes")
    if metadata or len(strides) != len(shape) or len(shape) > MOST_AXES:
        raise ValueError("it holds a conjugated or negated tensor, or one with too many axes")
    steps = tuple(step if size > 1 else 0 for size, step in zip(shape, strides, strict=True))
    end = offset + sum((size - 1) * step for size, step in zip(shape, steps, strict=True)) + 1
    _check_room(shape, end, storage.nbytes // dtype.itemsize)
    return StoredTensor(storage, dtype, offset * dtype.itemsize, shape, tuple(step * dtype.itemsize for step in steps))


def _check_room(shape: tuple[int, ...], end: int, room: int) -> None:
    values = math.prod(shape)
    if values and (end > room or values > room):
        raise ValueError(f"it has a tensor of shape {shape} in a storage of {room} values; save tensors as contiguous")
    if math.prod(size or 1 for size in shape) > LARGEST // 16:  # what NumPy can represent, though empty
        raise ValueError(f"it has a tensor of shape {shape}")


def _are_sizes(*values: Any) -> bool:
    return all(type(value) is int and 0 <= value <= LARGEST for value in values)


def _parameter(tensor: Any, *details: Any) -> Any:
    return tensor


def _ordered_dict(pairs: Any = ()) -> dict:
    ordered: dict[Any, Any] = {}
    fill([entry for key, value in pairs for entry in (key, value)], ordered)  # Python 2 passed its entries at once
    return ordered


def _size(sizes: Any) -> Any:
    return sizes


def _device(*place: Any) -> None:
    return None  # a tensor is read to the host, wherever it was


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))  # ml_dtypes has those that NumPy lacks


@dataclass(frozen=True)
class _StorageType:
    dtype: np.dtype


_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "storage.UntypedStorage": "uint8",
}
_WITHOUT_STORAGE = ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_type,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.Size": _size,
    "torch.device": _device,
}
# what a checkpoint may name -> what stands for it here
_NAMES: dict[str, Any] = (
    _FUNCTIONS
    | {f"torch.{name}": _StorageType(_dtype(dtype)) for name, dtype in _DTYPES.items()}
    | {f"torch.{name}": _dtype(name) for name in (*_DTYPES.values(), *_WITHOUT_STORAGE)}
)
