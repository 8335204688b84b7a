"""One case of a goldens folder: what it holds, what of it has been compared, and how far off the worst tensor is.

A case keeps the names that its driver owes it: every `out/` and `grad/` tensor, or every field of every row of a json
table. What is left at the end is a fault, so that nothing is passed over in silence.
"""

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array
from safetensors import safe_open

NOTES = {"source", "note", "remarks", "dtype", "seed"}  # of a file of tables: no tables
Measure = Callable[[np.ndarray, np.ndarray], float]


def of_max(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Returns the largest difference over the largest reference value (over 1 where all are 0)."""
    return absolute(ours, theirs) / (np.abs(theirs).max(initial=0) or 1.0)


def absolute(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Returns the largest difference."""
    return float(np.abs(ours - theirs).max(initial=0))


def relative_l2(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Returns the norm of the difference over the norm of the reference."""
    return float(np.linalg.norm(ours - theirs) / (np.linalg.norm(theirs) or 1.0))


def beyond_bfloat16(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Returns the largest difference beyond one step of bfloat16, the result of rounding almost equal values."""
    with np.errstate(divide="ignore"):
        step = 2.0 ** (np.floor(np.log2(np.abs(theirs))) - 7)
    return float(np.maximum(np.abs(ours - theirs) - step, 0).max(initial=0))


def bfloat16_steps(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Returns how many representable values lie between the two, at worst."""
    bits = [np.asarray(a, ml_dtypes.bfloat16).view(np.int16).astype(np.int64) for a in (ours, theirs)]
    ordered = [np.where(b < 0, -(b & 0x7FFF), b) for b in bits]
    return float(np.abs(ordered[0] - ordered[1]).max(initial=0))


class Tolerance(NamedTuple):
    """The largest error that passes, and how it is measured."""

    limit: float
    measure: Measure = of_max


EXACT = Tolerance(0.0, absolute)


class Comparison(NamedTuple):
    """The error of one tensor or table entry."""

    name: str
    error: float
    limit: float

    @property
    def passes(self) -> bool:
        """Whether the error is a number within the limit."""
        return self.error <= self.limit

    @property
    def share(self) -> float:
        """The error in units of the limit."""
        return 0.0 if self.error == 0 else self.error / self.limit if self.limit else math.inf


class Golden:
    """A json file and the tensors beside it; `values` are the names to compare, `folders` where other files may lie."""

    def __init__(self, path: Path, folders: Sequence[Path]):
        self.path, self.folders = path, folders
        self.about: dict[str, Any] = json.loads(path.read_text())
        self.tensors = read_tensors(path.with_suffix(".safetensors"))
        owed = {name: value for name, value in self.tensors.items() if name.startswith(("out/", "grad/"))}
        listed = {name for name in self.about.get("tensors", owed) if name.startswith(("out/", "grad/"))}
        if odd := listed ^ owed.keys():
            raise ValueError(f"{path.name} and its tensors disagree about {', '.join(sorted(odd)[:3])}.")
        self.values: dict[str, Any] = owed if self.tensors else {k: v for k, v in self.about.items() if k not in NOTES}
        self.left = set(self.values)
        self.comparisons: list[Comparison] = []
        self.excused: dict[str, str] = {}

    def part(self, prefix: str) -> dict[str, np.ndarray]:
        """Returns the tensors under a prefix such as "in/", without it."""
        return {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}

    def params(self) -> tuple[Path, dict[str, np.ndarray]]:
        """Returns the weights of the case and the file they come from, its own or that of `params_from`."""
        path = self.path.with_suffix(".safetensors")
        if source := self.about.get("params_from"):
            path = self.find(source.split(",")[0].strip())  # ", cast to bfloat16" may follow
        tensors = read_tensors(path).items()
        return path, {name.removeprefix("param/"): value for name, value in tensors if name.startswith("param/")}

    def find(self, name: str) -> Path:
        """Returns the path of another file, beside this one or else in any of the folders."""
        near = self.path.with_name(name)
        found = [near] if near.is_file() else [path for folder in self.folders for path in folder.rglob(name)]
        if not found:
            raise FileNotFoundError(f"{self.path.name} needs {name}, which is in none of the goldens folders.")
        return found[0]

    def rows(self, table: str, inputs: Collection[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields (name, row) of a json table; every "name.field" that is no input is then owed."""
        self.left.discard(table)
        for index, row in enumerate(self.values[table]):
            name = f"{table}[{index}]"
            self.values |= {f"{name}.{field}": value for field, value in row.items()}
            self.left |= {f"{name}.{field}" for field in row if field not in inputs}
            yield name, row

    def compare(self, name: str, ours: Any, tolerance: Tolerance = EXACT) -> None:
        """Compare one owed value; one that is not numbers must be equal."""
        self.check(name, ours, self.take(name), tolerance)

    def compare_found(self, ours: Mapping[str, Any], tolerance: Tolerance) -> None:
        """Compare those of `ours` that the case owes."""
        for name in sorted(self.left & ours.keys()):
            self.compare(name, ours[name], tolerance)

    def take(self, name: str) -> Any:
        """Returns an owed value that the driver checks in parts, or against what follows from it."""
        self.left.discard(name)
        return self.values[name]

    def check(self, name: str, ours: Any, theirs: Any, tolerance: Tolerance = EXACT) -> None:
        """Compare a value that is not owed, under a name of the driver's choice."""
        self.comparisons.append(Comparison(name, error_of(ours, theirs, tolerance.measure), tolerance.limit))

    def differs(self, name: str, ours: Any, tolerance: Tolerance) -> None:
        """Compare an owed value that must be further away than the tolerance."""
        theirs = self.take(name)
        apart = error_of(ours, theirs, tolerance.measure) > tolerance.limit
        self.comparisons.append(Comparison(f"{name} (must differ)", 0.0 if apart else math.inf, 0.0))

    def excuse(self, name: str, reason: str) -> None:
        """Strike an owed value off, because of a deviation that is written down."""
        self.left.discard(name)
        self.excused[name] = reason

    def faults(self) -> list[str]:
        """Returns a line for everything that is wrong, none if the case passes."""
        found = [
            f"{one.name}: error {one.error:.2e} above {one.limit:.1e}" for one in self.comparisons if not one.passes
        ]
        found += [f"{name} is not compared" for name in sorted(self.left)]
        return found if self.comparisons else [*found, "nothing is compared"]

    def worst(self) -> Comparison:
        """Returns the comparison closest to its limit, or furthest above it."""
        return max(self.comparisons, key=lambda one: (one.share, one.error), default=Comparison("-", 0.0, 0.0))


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Returns all tensors of a safetensors file; none if there is no such file."""
    if not path.is_file():
        return {}
    with safe_open(path, framework="numpy") as file:
        return {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 - no iterator


def channels_last(array: np.ndarray) -> Array:
    """Returns [B] C T H W as [B] T H W C."""
    return jnp.asarray(np.moveaxis(array, -4, -1))


def channels_first(array: Array | np.ndarray) -> np.ndarray:
    """Returns [B] T H W C as [B] C T H W."""
    return np.moveaxis(np.asarray(array), -1, -4)


def error_of(ours: Any, theirs: Any, measure: Measure) -> float:
    """Returns the error, infinite for another shape or a value that is not finite."""
    if not _is_numbers(theirs):
        return 0.0 if ours == theirs else math.inf
    a, b = np.asarray(ours).astype(np.float64), np.asarray(theirs).astype(np.float64)
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.inf
    return float(measure(a, b))


def _is_numbers(value: Any) -> bool:
    if isinstance(value, list | tuple) and value:
        return all(isinstance(one, int | float) for one in value)
    return isinstance(value, np.ndarray | int | float) and not isinstance(value, bool)
