"""The mean gradient over a batch that is too large to be taken at once: part by part inside the compiled step.

Part a of A holds the rows a, a + A, a + 2A, ...: the batch axis is reshaped to (B, A). A device holds neighbouring
rows, so that each has its share of every part and none has to move; of (A, B) the first part would lie on the first
devices alone.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import PyTree

Batch = dict[str, Array]
Metrics = dict[str, Array]
Objective = Callable[[Any, Any], tuple[Array, Metrics]]


def mean_gradient(objective: Objective, parts: int, params: Any, batch: PyTree[Array]) -> tuple[Array, Metrics, Any]:
    """Returns the mean over the parts of a batch of `objective(params, part)`, its metrics and its gradient.

    Gradients are added up in float32. 0-d leaves of a batch belong to all parts.
    Raises: ValueError for a batch that cannot be cut into `parts` equal ones.
    """
    gradient = jax.value_and_grad(objective, has_aux=True)
    if parts == 1:
        (value, metrics), grads = gradient(params, batch)
        return value, metrics, grads
    leaves, tree = jax.tree.flatten_with_path(batch)
    cut = [
        _cut(jax.tree_util.keystr(path, simple=True, separator="."), leaf, parts) if leaf.ndim else None
        for path, leaf in leaves
    ]

    def add(total: Any, rows: list[Array | None]) -> tuple[Any, tuple[Array, Metrics]]:
        part = [leaf if mine is None else mine for (_, leaf), mine in zip(leaves, rows, strict=True)]
        found, grads = gradient(params, jax.tree.unflatten(tree, part))
        return jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, grads), found

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
    total, found = jax.lax.scan(add, zeros, cut)
    value, metrics = jax.tree.map(lambda values: values.mean(0), found)
    return value, metrics, jax.tree.map(lambda t: t / parts, total)


def _cut(name: str, leaf: Array, parts: int) -> Array:
    if len(leaf) % parts:
        raise ValueError(f"A batch is taken in {parts} parts (accumulation_steps): {name} has {len(leaf)} rows.")
    return jnp.moveaxis(leaf.reshape(len(leaf) // parts, parts, *leaf.shape[1:]), 1, 0)
