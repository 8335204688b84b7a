"""A tensor that lies in a file: its shape is known, and its values are read when and where they are asked for.

Each read maps the bytes it needs and drops the map again. Mapped pages count as memory of the process, so that a map
kept open would grow to the size of the file; a large read goes piece by piece for the same reason.
"""

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import SupportsIndex

import numpy as np
from numpy.typing import DTypeLike

from opensora_jax.config.errors import UserError

PIECE = 64 << 20  # bytes mapped at a time

Index = SupportsIndex | slice | tuple[SupportsIndex | slice, ...]


@dataclass(frozen=True)
class FileTensor:
    """`shape` values of `dtype` in the file `path`, the first of them at byte `offset`.

    `strides` are in bytes, as NumPy has them; None means C order.
    """

    path: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """The size of the values in memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, index: Index) -> np.ndarray:
        """Returns a new C-ordered array of the part; a zero-dimensional one if every axis has an integer.

        Raises: UserError for a file that is gone or shorter than it was; IndexError as NumPy does.
        """
        return self._part(index)._read()

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        """Returns all values, in `dtype` if it is given."""
        if copy is False:
            raise ValueError("A tensor in a file can only be copied to memory; ask for it without copy=False.")
        return self._read().astype(self.dtype if dtype is None else dtype, copy=False)

    def _part(self, index: Index) -> "FileTensor":
        index = index if isinstance(index, tuple) else (index,)
        if len(index) > len(self.shape):
            raise IndexError(f"{len(index)} indices for the {len(self.shape)} axes of a tensor in {self.path}")
        strides = self._byte_strides()
        offset, kept = self.offset, []
        for at, size, stride in zip(index, self.shape, strides, strict=False):
            if isinstance(at, slice):
                chosen = range(size)[at]
                offset += chosen.start * stride if chosen else 0
                kept.append((len(chosen), stride * chosen.step))
            else:
                offset += range(size)[operator.index(at)] * stride
        kept += zip(self.shape[len(index) :], strides[len(index) :], strict=True)
        shape, strides = tuple(size for size, _ in kept), tuple(stride for _, stride in kept)
        return FileTensor(self.path, offset, self.dtype, shape, strides)

    def _read(self) -> np.ndarray:
        values = np.empty(self.shape, self.dtype)
        if not values.size:
            return values
        for piece in self._pieces():
            values[piece] = self._part(piece)._mapped()
        return values

    def _pieces(self) -> Iterator[tuple[slice, ...]]:
        """Yields the parts to read one after the other: cuts across the axis whose steps are the longest."""
        steps = [abs(stride) if size > 1 else 0 for size, stride in zip(self.shape, self._byte_strides(), strict=True)]
        if max(steps, default=0) == 0:
            yield ()
            return
        axis = int(np.argmax(steps))
        rows = max(1, PIECE // steps[axis])
        for start in range(0, self.shape[axis], rows):
            yield (*[slice(None)] * axis, slice(start, start + rows))

    def _mapped(self) -> np.ndarray:
        strides = self._byte_strides()
        reach = [(size - 1) * stride for size, stride in zip(self.shape, strides, strict=True)]
        first = self.offset + sum(step for step in reach if step < 0)
        end = self.offset + sum(step for step in reach if step > 0) + self.dtype.itemsize
        try:
            data = np.memmap(self.path, np.uint8, "r", first, (end - first,))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.path} was opened and can no longer be read as it was ({error}); leave the file in place."
            ) from error
        return np.ndarray(self.shape, self.dtype, data, self.offset - first, strides)

    def _byte_strides(self) -> tuple[int, ...]:
        if self.strides is not None:
            return self.strides
        return tuple(self.dtype.itemsize * math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))
