"""Adam's two moments kept in bfloat16: half their memory, a quarter of a training state with an average.

Each update widens them to float32, computes there, and rounds what is kept. The second moment is rounded at random,
up or down with the probability that makes the mean exact: with beta2 = 0.999 it changes by less than half a step of
bfloat16 (0.2%), so that rounding to the nearest would never let it fall. The first changes by a tenth and needs none.
Source: stochastic rounding as in Gupta et al. 2015 (arXiv:1502.02551).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import BFloat16, Float32, UInt32

State = optax.ScaleByAdamState


def bfloat16_moments(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns `optax.scale_by_adam(...)` with both moments in bfloat16 between updates.

    What is drawn depends on the number of updates alone, so that a restarted run goes on as it would have.
    """

    def init(params: Any) -> Any:
        state: Any = adam.init(params)
        return State(state.count, _narrow(state.mu), _narrow(state.nu))

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        wide = State(state.count, *(optax.tree.cast(moment, jnp.float32) for moment in (state.mu, state.nu)))
        direction, after = adam.update(grads, wide, params)
        return direction, State(after.count, _narrow(after.mu), _randomly_rounded(after.nu, after.count))

    return optax.GradientTransformation(init, update)


def round_randomly(x: Float32[Array, "*B"], seed: UInt32[Array, ""]) -> BFloat16[Array, "*B"]:
    """Returns finite `x` in bfloat16, rounded to one of its two neighbours so that the mean over seeds is `x`."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (_draw(x.shape, seed) >> 16)
    return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32).astype(jnp.bfloat16)


def _draw(shape: tuple[int, ...], seed: Array) -> Array:
    """Returns 32 bits for each place: its number and the seed, mixed.

    A few integer operations that the compiler puts into the update itself: those of `jax.random` would be an array of
    several times the moment's size. Source: the end of MurmurHash3 (A. Appleby, public domain), twice.
    """
    strides = [int(np.prod(shape[axis + 1 :], dtype=np.int64)) % 2**32 for axis in range(len(shape))]
    places = (jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(n) for axis, n in enumerate(strides))
    return _mix(_mix(sum(places, start=jnp.zeros(shape, jnp.uint32))) ^ _mix(seed))


def _mix(x: Array) -> Array:
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _narrow(moment: Any) -> Any:
    return optax.tree.cast(moment, jnp.bfloat16)


def _randomly_rounded(moment: Any, count: Array) -> Any:
    leaves, tree = jax.tree.flatten(moment)
    seeds = count.astype(jnp.uint32) * np.uint32(len(leaves)) + np.arange(len(leaves), dtype=np.uint32)
    return jax.tree.unflatten(tree, [round_randomly(leaf, seed) for leaf, seed in zip(leaves, seeds, strict=True)])
