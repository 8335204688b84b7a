"""Ring attention: keys and values of a sample travel around the devices that share its tokens.

Every device keeps its queries and meets the keys of one device after another, by the same kernels as attention on one
device (kernels/flash.py). Results are merged in float32 by the logsumexp of their logits, and the backward pass starts
from that of all keys, so no block needs the others. It goes around once more, and the gradients of keys and values
travel along with them. Logits are never held.

Source: Liu, Zaharia and Abbeel 2023 (arXiv:2310.01889); the merge is that of Dao 2023 (arXiv:2307.08691).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float

from opensora_jax.kernels import flash
from opensora_jax.kernels.chunked import LOWEST
from opensora_jax.kernels.flash import ATTENTION, STATISTICS
from opensora_jax.parallel.tokens import SharedTokens


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def ring_attention(
    q: Float[Array, "B L N K"], k: Float[Array, "B L N K"], v: Float[Array, "B L N K"], shared: SharedTokens
) -> Float[Array, "B L N K"]:
    """Returns attention of a device's queries over the tokens of all devices along `shared.axis`."""
    return _forward(q, k, v, shared)[0]


def _forward(q: Array, k: Array, v: Array, shared: SharedTokens) -> tuple[Array, tuple[Array, ...]]:
    def meet(
        known: tuple[Array, Array], _: tuple, k: Array, v: Array, step: Array | int
    ) -> tuple[tuple[Array, Array], tuple]:
        (out, lse), real = known, _real(shared, step)
        block, block_lse = flash.forward(q, k, v, real, scale=q.shape[-1] ** -0.5, dtype=jnp.float32)
        both = jnp.logaddexp(lse, block_lse)
        return (out * _weight(lse - both) + block * _weight(block_lse - both), both), ()

    B, L, N, _ = q.shape
    nothing = jnp.zeros(q.shape, jnp.float32), jnp.full((B, N, L), LOWEST, jnp.float32)
    (out, lse), _ = _around(meet, nothing, (), k, v, shared)
    # Where a policy keeps these two, the backward pass of a layer does not go around forwards again.
    out, lse = checkpoint_name(out.astype(v.dtype), ATTENTION), checkpoint_name(lse, STATISTICS)
    return out, (q, k, v, out, lse)


def _backward(shared: SharedTokens, kept: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, Array]:
    q, k, v, out, lse = kept

    def meet(dq: Array, dkv: tuple[Array, Array], k: Array, v: Array, step: Array | int) -> tuple[Array, tuple]:
        options = {"scale": q.shape[-1] ** -0.5, "dtype": jnp.float32}
        by_q, by_k, by_v = flash.backward(q, k, v, _real(shared, step), gradient, out, lse, **options)
        return dq + by_q, (dkv[0] + by_k, dkv[1] + by_v)

    dq, dk, dv = (jnp.zeros(part.shape, jnp.float32) for part in (q, k, v))
    dq, (dk, dv) = _around(meet, dq, (dk, dv), k, v, shared)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


ring_attention.defvjp(_forward, _backward)


def _around(meet: Callable, stays: Any, follows: Any, k: Array, v: Array, shared: SharedTokens) -> tuple[Any, Any]:
    """Returns `stays` and `follows` after meeting the keys and values of every device.

    `meet(stays, follows, k, v, step)` returns both anew; `follows` travels with its keys and values and ends at home.
    """

    def body(carry: tuple, step: Array) -> tuple[tuple, None]:
        stays, follows, k, v = carry
        coming = _pass_on((k, v), shared)  # they travel while this block is computed
        stays, follows = meet(stays, follows, k, v, step)
        return (stays, _pass_on(follows, shared), *coming), None

    (stays, follows, k, v), _ = jax.lax.scan(body, (stays, follows, k, v), jnp.arange(shared.shards - 1))
    stays, follows = meet(stays, follows, k, v, shared.shards - 1)
    return stays, _pass_on(follows, shared)


def _pass_on(parts: Any, shared: SharedTokens) -> Any:
    neighbours = [(i, (i + 1) % shared.shards) for i in range(shared.shards)]
    return jax.tree.map(lambda part: jax.lax.ppermute(part, shared.axis, neighbours), parts)


def _real(shared: SharedTokens, step: Array | int) -> Bool[Array, "1 L"] | None:
    """Returns which of the keys that arrive after `step` steps are no padding; None for all."""
    if shared.real is None:
        return None
    owner = (jax.lax.axis_index(shared.axis) - step) % shared.shards
    return jnp.asarray(shared.real)[owner][None]


def _weight(log: Float[Array, "B N L"]) -> Float[Array, "B L N 1"]:
    return rearrange(jnp.exp(log), "B N L -> B L N 1")
