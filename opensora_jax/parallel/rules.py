"""From the logical axes that layers state to shardings: the one place that knows both.

An axis that a mesh axis does not divide stays whole: correct everywhere, and small layers gain nothing from a split.
"""

from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from opensora_jax.config.errors import UserError

RULES = {"embed": "fsdp", "mlp": "tensor", "heads": "tensor", "vocabulary": None}


def param_spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Returns the spec of one parameter; scanned layers have leading axes without a name, and those stay whole.

    Raises: UserError for an axis without a rule.
    """
    named = (None,) * (len(shape) - len(axes)) + tuple(axes)
    used: set[str] = set()
    spec: list[str | None] = []
    for name, size in zip(named, shape, strict=True):
        axis = None if name is None else _rule(name, shape)
        fits = axis is not None and axis not in used and size % mesh.shape[axis] == 0
        spec.append(axis if fits else None)
        used |= {axis} if fits and axis is not None else set()
    return PartitionSpec(*spec)


def _rule(name: str, shape: tuple[int, ...]) -> str | None:
    if name not in RULES:
        raise UserError(
            f"no rule says how to split the axis {name!r} of a parameter of shape {shape}: name one of "
            f"{', '.join(RULES)}, or add a rule to parallel/rules.py"
        )
    return RULES[name]


def param_shardings(params: nnx.State, mesh: Mesh) -> nnx.State:
    """Returns the shardings of a module's parameters, in the tree of `params`; arrays may be abstract."""

    def sharding(param: nnx.Variable) -> Any:
        axes = param.get_metadata()["axes"]
        return param.replace(NamedSharding(mesh, param_spec(axes, param.get_value().shape, mesh)))

    return jax.tree.map(sharding, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def state_shardings(state: Any, params: nnx.State, mesh: Mesh) -> Any:
    """Returns shardings for a tree that holds copies of the parameters (EMA, moments) among small leaves.

    A leaf is sharded like the parameter whose path ends its own; all else is replicated.
    """
    by_path = dict(jax.tree.leaves_with_path(param_shardings(params, mesh)))
    shapes = {path: leaf.shape for path, leaf in jax.tree.leaves_with_path(params)}

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        for start in range(len(path)):
            tail = path[start:]
            if tail in by_path and shapes[tail] == leaf.shape:
                return by_path[tail]
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map_with_path(sharding, state)
