"""Operations of a traced program: its products of matrices and convolutions, loops times their length.

A product (m, k) x (k, n) counts 2 m k n, as in `training/flops.py`, and a sum of products nothing; what is recomputed
counts again. Kernels of Pallas count what their body does at every place of their grid, so that a call in compiled text
can be told what it takes.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from jax.extend import core

from opensora_jax.forecast.hlo import Instruction, array_shapes

Shapes = tuple[tuple[int, ...], ...]


class Kernel(NamedTuple):
    """A call of a kernel: its name and the shapes of its results."""

    name: str
    results: Shapes


class Count(NamedTuple):
    """Operations of a program on all devices, and of one call of each of its kernels on one."""

    flops: float
    kernel_flops: float  # of those, the ones in kernels
    kernels: dict[Kernel, float]


def count(jaxpr: core.Jaxpr, platform: str = "tpu") -> Count:
    """Returns what a traced program does on a platform."""
    kernels: dict[Kernel, float] = {}
    totals = _count(jaxpr, kernels, platform)
    return Count(sum(totals.values()), totals.get("kernels", 0.0), kernels)


def _count(jaxpr: Any, kernels: dict[Kernel, float], platform: str) -> dict[str, float]:
    total: defaultdict[str, float] = defaultdict(float)
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "pallas_call":
            flops = _kernel(equation, platform)
            results = tuple(tuple(variable.aval.shape) for variable in equation.outvars)
            kernels[Kernel(_name(equation), results)] = flops
            total["kernels"] += flops
            continue
        if name in _PRODUCTS:
            total["products"] += _PRODUCTS[name](equation)
        inside = _lowered(equation, platform)
        inner = [_count(part, kernels, platform) for part in inside]
        if name == "cond":
            inner = [max(inner, key=lambda found: sum(found.values()))]
        for found in inner:
            for key, value in found.items():
                total[key] += _times(equation) * value
    return total


def _lowered(equation: core.JaxprEqn, platform: str) -> list[Any]:
    """Returns the traces inside an equation; of branches for several platforms the one that is compiled."""
    inside = list(core.jaxprs_in_params(equation.params))
    platforms = equation.params.get("branches_platforms")
    if not platforms:
        return inside
    chosen = [branch for branch, names in zip(inside, platforms, strict=True) if names is None or platform in names]
    return chosen[:1]


def _times(equation: core.JaxprEqn) -> int:
    """Returns how often the inside of an equation runs, on all devices together."""
    if equation.primitive.name == "scan":
        return equation.params["length"]
    if equation.primitive.name == "shard_map":
        sizes = equation.params["mesh"].shape
        axes = equation.params.get("newly_manual_axes") or equation.params["manual_axes"]
        return math.prod(sizes[axis] for axis in axes)
    return 1


def _dot(equation: Any) -> int:
    (contracted, _), (shared, _) = equation.params["dimension_numbers"]
    left, right = (given.aval.shape for given in equation.invars)
    if len(left) == len(right) == len(contracted) + len(shared):
        return 0  # a sum of products, value by value: nothing for a matrix unit
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: Any) -> int:
    kernel, numbers = equation.invars[1].aval.shape, equation.params["dimension_numbers"]
    taps = math.prod(kernel[axis] for axis in numbers.rhs_spec[1:])  # inputs of a group, then space
    return 2 * math.prod(equation.outvars[0].aval.shape) * taps


_PRODUCTS = {"dot_general": _dot, "conv_general_dilated": _convolution}


def _kernel(equation: core.JaxprEqn, platform: str) -> float:
    """Returns the operations of one call; branches that depend on the place count as if always taken."""
    estimate = equation.params.get("cost_estimate")
    if estimate is not None and estimate.flops:
        return float(estimate.flops)
    grid = math.prod(size for size in equation.params["grid_mapping"].grid if isinstance(size, int))
    inside = _count(equation.params["jaxpr"], {}, platform)
    return float(grid * sum(inside.values()))


def _name(equation: core.JaxprEqn) -> str:
    return str(equation.params.get("name") or "")


def flops_of_call(kernels: Mapping[Kernel, float], instruction: Instruction) -> float | None:
    """Returns the operations of a kernel's call in compiled text, None for a kernel that was not counted.

    The compiler calls an instruction like the kernel, with a number; results may be fewer than in the trace.
    """
    shapes = tuple(dims for _, dims in array_shapes(instruction.shape))
    named = [(kernel, flops) for kernel, flops in kernels.items() if _is_called(instruction, kernel.name)]
    exact = [flops for kernel, flops in named if kernel.results == shapes]
    close = exact or [flops for _, flops in named]
    return max(close) if close else None


def _is_called(instruction: Instruction, name: str) -> bool:
    return bool(name) and (instruction.name.split(".")[0] == name or f"/{name}/" in instruction.attributes)


def as_json(kernels: Mapping[Kernel, float]) -> list[Any]:
    """Returns the kernels as JSON can hold them."""
    return [[kernel.name, kernel.results, flops] for kernel, flops in kernels.items()]


def from_json(value: list[Any]) -> dict[Kernel, float]:
    """Returns what `as_json` was given."""
    return {Kernel(name, tuple(map(tuple, results))): flops for name, results, flops in value}
