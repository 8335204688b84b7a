"""Ring attention: keys and values of a sample travel around the devices that share its tokens.

Every device keeps its queries and meets the keys of one device after another; the sums of a softmax are kept in
float32 and rescaled as the largest logit grows. The backward pass goes around once more, and the gradients of keys and
values travel along with them, so that no more than one block of logits is ever held.

Source: Liu, Zaharia and Abbeel 2023 (arXiv:2310.01889); the running softmax is that of Milakov and Gimelshein 2018.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from opensora_jax.parallel.tokens import SharedTokens

ATTENTION = "attention"  # what a policy of rematerialisation calls the results of attention
LOWEST = -1e30  # below every logit and finite, so that differences of it are numbers

_product = partial(jnp.einsum, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def ring_attention(
    q: Float[Array, "B L N K"], k: Float[Array, "B L N K"], v: Float[Array, "B L N K"], shared: SharedTokens
) -> Float[Array, "B L N K"]:
    """Returns attention of a device's queries over the tokens of all devices along `shared.axis`."""
    return _forward(q, k, v, shared)[0]


def _forward(q: Array, k: Array, v: Array, shared: SharedTokens) -> tuple[Array, tuple[Array, ...]]:
    def meet(
        sums: tuple[Array, ...], _: tuple, k: Array, v: Array, step: Array | int
    ) -> tuple[tuple[Array, ...], tuple]:
        seen, peak, total = sums
        logits = _logits(q, k, shared, step)
        higher = jnp.maximum(peak, logits.max(-1))
        weights, shrink = jnp.exp(logits - higher[..., None]), jnp.exp(peak - higher)
        seen = seen * shrink[..., None] + _product("BNLS,BSNK->BNLK", weights.astype(v.dtype), v)
        return (seen, higher, total * shrink + weights.sum(-1)), ()

    B, L, N, K = q.shape
    zeros = jnp.zeros((B, N, L), jnp.float32)
    sums = (jnp.zeros((B, N, L, K), jnp.float32), zeros + LOWEST, zeros)
    (seen, peak, total), _ = _around(meet, sums, (), k, v, shared)
    out = jnp.einsum("BNLK->BLNK", seen / total[..., None]).astype(v.dtype)
    # Where a policy keeps these two, the backward pass of a layer does not go around forwards again.
    out, log_total = (checkpoint_name(kept, ATTENTION) for kept in (out, peak + jnp.log(total)))
    return out, (q, k, v, out, log_total)


def _backward(shared: SharedTokens, kept: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, Array]:
    q, k, v, out, log_total = kept
    centre = _product("BLNK,BLNK->BNL", gradient, out)

    def meet(dq: Array, dkv: tuple[Array, Array], k: Array, v: Array, step: Array | int) -> tuple[Array, tuple]:
        weights = jnp.exp(_logits(q, k, shared, step) - log_total[..., None])
        dlogits = weights * (_product("BLNK,BSNK->BNLS", gradient, v) - centre[..., None])
        dlogits = (dlogits * q.shape[-1] ** -0.5).astype(q.dtype)
        dk = dkv[0] + _product("BNLS,BLNK->BSNK", dlogits, q)
        dv = dkv[1] + _product("BNLS,BLNK->BSNK", weights.astype(v.dtype), gradient)
        return dq + _product("BNLS,BSNK->BLNK", dlogits, k), (dk, dv)

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


def _logits(q: Array, k: Array, shared: SharedTokens, step: Array | int) -> Float[Array, "B N L S"]:
    """Returns the logits of the keys that arrive after `step` steps; those of padding are minus infinity."""
    logits = _product("BLNK,BSNK->BNLS", q, k) * q.shape[-1] ** -0.5
    if shared.real is None:
        return logits
    owner = (jax.lax.axis_index(shared.axis) - step) % shared.shards
    return jnp.where(jnp.asarray(shared.real)[owner], logits, -jnp.inf)
