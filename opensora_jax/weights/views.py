"""Tensors made of others: chosen rows, several joined, another dtype. Nothing is read before it is asked for.

A source has `shape` and `dtype`, and an index (a tuple of slices, one for each axis) that reads a part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike


@dataclass(frozen=True, eq=False)
class Rows:
    """Chosen rows of a tensor, in a new order; read when indexed."""

    source: Any
    rows: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape with the chosen rows."""
        return (len(self.rows), *self.source.shape[1:])

    @property
    def dtype(self) -> DTypeLike:
        """The source's dtype."""
        return self.source.dtype

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        first, *rest = index
        rows = self.rows[first]
        low, high = (int(rows.min()), int(rows.max()) + 1) if len(rows) else (0, 0)
        return np.asarray(self.source[(slice(low, high), *rest)])[rows - low]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[(slice(None),) * len(self.shape)], dtype)


@dataclass(frozen=True, eq=False)
class Joined:
    """Tensors one below the other; read when indexed, and only those that are asked for."""

    parts: Sequence[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape with all rows."""
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def dtype(self) -> DTypeLike:
        """The dtype of the parts."""
        return self.parts[0].dtype

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        first, *rest = index
        rows, found, start = range(self.shape[0])[first], [], 0
        for part in self.parts:
            stop = start + part.shape[0]
            low, high = max(rows.start, start), min(rows.stop, stop)
            if low < high:
                found.append(np.asarray(part[(slice(low - start, high - start), *rest)]))
            start = stop
        return np.concatenate(found or [np.asarray(self.parts[0][(slice(0, 0), *rest)])])

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[(slice(None),) * len(self.shape)], dtype)


@dataclass(frozen=True, eq=False)
class Cast:
    """A tensor in another dtype."""

    source: Any
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The source's shape."""
        return self.source.shape

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        return np.asarray(self.source[index]).astype(self.dtype)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.source).astype(self.dtype if dtype is None else dtype, copy=False)
