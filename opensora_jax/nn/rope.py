"""Rotary position embedding over several axes (time, height, width).

One table of angles serves both layouts of published weights: Flux turns neighbouring pairs of channels, Open-Sora v2
turns channel j with channel j + K/2 across the whole head.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Num

Table = tuple[Float[Array, "*B L F"], Float[Array, "*B L F"]]


def rope_table(ids: Num[Array, "*B L A"], axes_dim: tuple[int, ...], theta: float | int) -> Table:
    """Returns cos and sin of the angles of every position, the axes one after the other: F = sum(axes_dim) / 2.

    Source: Flux (black-forest-labs/flux, `math.py`); frequencies are theta ** (-2i / axis size), made in float64.
    """
    frequencies = [(theta ** (-np.arange(0, d, 2) / d)).astype(np.float32) for d in axes_dim]
    positions = ids.astype(jnp.float32)
    angles = jnp.concatenate([positions[..., i, None] * f for i, f in enumerate(frequencies)], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def _turn(a: Array, b: Array, table: Table) -> tuple[Array, Array]:
    cos, sin = (part[..., None, :] for part in table)  # one angle for all heads
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return a * cos - b * sin, b * cos + a * sin


def rotate_half(x: Float[Array, "B L N K"], table: Table) -> Float[Array, "B L N K"]:
    """Returns `x` with channels (j, j + K/2) of each head turned by angle j (Open-Sora v2 weights)."""
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate(_turn(a, b, table), axis=-1).astype(x.dtype)


def rotate_pairs(x: Float[Array, "B L N K"], table: Table) -> Float[Array, "B L N K"]:
    """Returns `x` with channels (2j, 2j + 1) of each head turned by angle j (Flux weights)."""
    return jnp.stack(_turn(x[..., 0::2], x[..., 1::2], table), axis=-1).reshape(x.shape).astype(x.dtype)
