"""A function that runs outside `jax.jit`, as the programs it consists of: compiled methods, and operations alone.

Autoencoders work in this way (`models/codec.py`): their tiles run one after the other. The function is traced, and each
equation of the trace is a program whose inputs lie as the programs before it left them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend import core
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from opensora_jax.forecast.programs import bytes_on_a_device

# (name, jitted function, arguments) -> (shardings of the results, temporary bytes of a device)
Compile = Callable[[str, Any, list[Any]], tuple[list[Any], int]]


class Run(NamedTuple):
    """What running a function's parts takes: how often each program ran, and the most bytes of a device at a time."""

    counts: dict[str, int]
    peak_bytes: int


def run(function: Callable, arguments: tuple[Any, ...], mesh: Mesh, compile_program: Compile) -> Run:
    """Returns what a function takes; each of its programs is compiled once, as `compile_program` does."""
    closed = jax.make_jaxpr(function)(*arguments)
    return _Run(closed.jaxpr, mesh, compile_program).of(jax.tree.leaves(arguments), closed.consts)


class _Run:
    """One pass over the equations of a trace."""

    def __init__(self, jaxpr: core.Jaxpr, mesh: Mesh, compile_program: Compile):
        self.jaxpr, self.compile = jaxpr, compile_program
        self.everywhere = NamedSharding(mesh, PartitionSpec())
        self.values: dict[core.Var, jax.ShapeDtypeStruct] = {}
        self.done: dict[Any, tuple[str, list[Any], int]] = {}
        self.last_use = {
            variable: place
            for place, equation in enumerate(jaxpr.eqns)
            for variable in equation.invars
            if isinstance(variable, core.Var)
        }

    def of(self, arguments: list[Any], constants: list[Any]) -> Run:
        self.values |= dict(zip(self.jaxpr.invars, arguments, strict=True))
        self.values |= {v: self._shape(v.aval) for v, _ in zip(self.jaxpr.constvars, constants, strict=True)}
        counts: dict[str, int] = {}
        peak = 0
        kept = {*self.jaxpr.invars, *self.jaxpr.outvars}
        for place, equation in enumerate(self.jaxpr.eqns):
            name, temporary = self._equation(equation)
            counts[name] = counts.get(name, 0) + 1
            peak = max(peak, temporary + bytes_on_a_device(list(self.values.values())))
            for variable in list(self.values):
                if variable not in kept and self.last_use.get(variable, -1) <= place:
                    del self.values[variable]
        return Run(counts, peak)

    def _equation(self, equation: Any) -> tuple[str, int]:
        given = [self.values[one] if isinstance(one, core.Var) else self._shape(one.aval) for one in equation.invars]
        inner = equation.params.get("jaxpr") if equation.primitive.name in ("pjit", "jit") else None
        what: Any = id(inner) if inner is not None else repr(sorted(equation.params.items(), key=str))
        key = (equation.primitive.name, what, *((one.shape, str(one.dtype), str(one.sharding)) for one in given))
        if key not in self.done:
            number = sum(known[0] == equation.primitive.name for known in self.done)
            name = f"{equation.params.get('name', equation.primitive.name)} {number + 1}"
            function = core.jaxpr_as_fun(inner) if inner is not None else _bound(equation)
            self.done[key] = name, *self.compile(name, jax.jit(function), given)
        name, shardings, temporary = self.done[key]
        for variable, sharding in zip(equation.outvars, shardings, strict=True):
            self.values[variable] = jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype, sharding=sharding)
        return name, temporary

    def _shape(self, aval: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=self.everywhere)


def _bound(equation: Any) -> Callable:
    def function(*operands: Any) -> list[Any]:
        found = equation.primitive.bind(*operands, **equation.params)
        return found if equation.primitive.multiple_results else [found]

    return function
