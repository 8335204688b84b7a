"""Methods of modules that run as one compiled program, also when they are called outside `jax.jit`.

With `each_alone=True`, every device of the mesh in JAX's context runs it on samples of its own (`parallel/samples.py`).
`nnx.jit` would do, but it returns the module's parameters as well, as if the call had changed them.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, TypeVar

import jax
from flax import nnx

from opensora_jax.parallel import samples

R = TypeVar("R")


def compiled(method: Callable[..., R]) -> Callable[..., R]:
    """Returns the method of a module, of arrays to arrays, compiled once for every network and every shapes.

    Arrays are given by position; what is given by name is a constant of the program.
    Inside another `jax.jit` it is a part of that program like any other function.
    """

    @partial(jax.jit, static_argnums=(0, 1, 2))
    def run(
        graph: nnx.GraphDef, constants: tuple[tuple[str, Any], ...], each_alone: bool, params: Any, *arrays: Any
    ) -> R:
        def whole(params: Any, *arrays: Any) -> R:
            return method(nnx.merge(graph, params), *arrays, **dict(constants))

        return samples.each_alone(whole, params, *arrays) if each_alone else whole(params, *arrays)

    @wraps(method)
    def call(self: nnx.Module, *arrays: Any, each_alone: bool = False, **constants: Any) -> R:
        graph, params = nnx.split(self)
        return run(graph, tuple(constants.items()), each_alone, params, *arrays)

    return call
