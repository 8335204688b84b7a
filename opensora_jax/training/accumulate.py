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

Batch = dict[str, Array]
Metrics = dict[str, Array]
Objective = Callable[[Any, Batch, Array], tuple[Array, Metrics]]


def mean_gradient(
    objective: Objective, parts: int, params: Any, batch: Batch, key: Array
) -> tuple[Array, Metrics, Any]:
    """Returns the mean over the parts of a batch of `objective(params, part, key)`, its metrics and its gradient.

    Gradients are added up in float32. Each part has its own key; 0-d values of a batch belong to all parts.
    Raises: ValueError for a batch that cannot be cut into `parts` equal ones.
    """
    gradient = jax.value_and_grad(objective, has_aux=True)
    if parts == 1:
        (value, metrics), grads = gradient(params, batch, key)
        return value, metrics, grads
    whole = {name: leaf for name, leaf in batch.items() if leaf.ndim == 0}
    rows = {name: _cut(name, leaf, parts) for name, leaf in batch.items() if leaf.ndim}

    def add(total: Any, part: tuple[Array, Batch]) -> tuple[Any, tuple[Array, Metrics]]:
        number, rows = part
        found, grads = gradient(params, rows | whole, jax.random.fold_in(key, number))
        return jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, grads), found

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
    total, found = jax.lax.scan(add, zeros, (jnp.arange(parts), rows))
    value, metrics = jax.tree.map(lambda values: values.mean(0), found)
    return value, metrics, jax.tree.map(lambda t: t / parts, total)


def _cut(name: str, leaf: Array, parts: int) -> Array:
    if len(leaf) % parts:
        raise ValueError(f"A batch is taken in {parts} parts (accumulation_steps): {name} has {len(leaf)} rows.")
    return jnp.moveaxis(leaf.reshape(len(leaf) // parts, parts, *leaf.shape[1:]), 1, 0)
