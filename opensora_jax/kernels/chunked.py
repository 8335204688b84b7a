"""Attention by XLA alone in bounded memory: queries and keys meet chunk by chunk, sums are rescaled as peaks grow.

For CPUs, for devices without a kernel of their own, and for what their kernels cannot do. Exact, as flash attention is;
what fits one chunk runs without loops.

Source: Rabe and Staats 2021 (arXiv:2112.05682); Dao 2023 (arXiv:2307.08691) for the backward pass.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from opensora_jax.kernels.choice import platform

LOGITS = 2**21  # held at a time: 8 MiB stay in a CPU's caches
KEYS = 2048  # of a chunk: one that holds all keys needs no second pass over sums
LOWEST = -1e30  # where a running maximum begins: finite, so that differences of it are numbers

_product = partial(jnp.einsum, preferred_element_type=jnp.float32)


def forward(
    q: Float[Array, "B L N K"],
    k: Float[Array, "B S N K"],
    v: Float[Array, "B S N K"],
    real: Bool[Array, "#B S"] | None,
    *,
    scale: float,
    dtype: DTypeLike,
    logits: int = LOGITS,
) -> tuple[Float[Array, "B L N K"], Float[Array, "B N L"]]:
    """Returns attention in `dtype` and the logsumexp of every query's logits; `real` says which keys count.

    A sample without real keys gets zeros and a logsumexp near -1e30. About `logits` are held at a time, but 128 queries
    and 128 keys of every head at least.
    """
    if (heads := _heads(q, k, logits)) < q.shape[0] * q.shape[2]:
        run = partial(forward, scale=scale, dtype=dtype, logits=logits)
        return _over_heads(run, (q, k, v), (), real, heads)
    rows, columns = _sizes(q, k, logits)
    known = _columns(k, v, real, columns)

    def of_queries(_: None, q: Array) -> tuple[None, tuple[Array, Array]]:
        def meet(sums: tuple[Array, ...], keys: tuple[Array, Array, Array | None]) -> tuple[tuple[Array, ...], None]:
            (seen, peak, total), (k, v, real) = sums, keys
            found = _logits(q, k, real, scale)
            higher = jnp.maximum(peak, found.max(-1))
            weights, shrink = jnp.exp(found - higher[..., None]), jnp.exp(peak - higher)
            seen = seen * shrink[..., None] + _product("BNLS,BNSK->BNLK", weights.astype(v.dtype), v)
            return (seen, higher, total * shrink + weights.sum(-1)), None

        zeros = jnp.zeros(q.shape[:3], jnp.float32)
        (seen, peak, total), _ = _over(meet, (jnp.zeros(q.shape, jnp.float32), zeros + LOWEST, zeros), known)
        total = jnp.maximum(total, 1.0)  # the largest logit alone adds 1
        return None, ((seen / total[..., None]).astype(dtype), peak + jnp.log(total))

    _, (out, lse) = _over(of_queries, None, _split(q, rows))
    return _joined(out, q.shape[1]), rearrange(lse, "steps B N L -> B N (steps L)")[..., : q.shape[1]]


def backward(
    q: Float[Array, "B L N K"],
    k: Float[Array, "B S N K"],
    v: Float[Array, "B S N K"],
    real: Bool[Array, "#B S"] | None,
    gradient: Float[Array, "B L N K"],
    out: Float[Array, "B L N K"],
    lse: Float[Array, "B N L"],
    *,
    scale: float,
    dtype: DTypeLike,
    logits: int = LOGITS,
) -> tuple[Float[Array, "B L N K"], Float[Array, "B S N K"], Float[Array, "B S N K"]]:
    """Returns the gradients of queries, keys and values in `dtype`, from that of the output.

    `out` and `lse` are of attention over all keys, these or more.
    """
    if (heads := _heads(q, k, logits)) < q.shape[0] * q.shape[2]:
        run = partial(backward, scale=scale, dtype=dtype, logits=logits)
        return _over_heads(run, (q, k, v, gradient, out), (lse,), real, heads)
    centre = _product("BLNK,BLNK->BNL", gradient, out)
    rows, columns = _sizes(q, k, logits)
    known = (_split(q, rows), _split(gradient, rows), _split_rows(lse, rows), _split_rows(centre, rows))

    def of_keys(dq: Array, keys: tuple[Array, Array, Array | None]) -> tuple[Array, tuple[Array, Array]]:
        k, v, real = keys
        turned, real = k.mT, None if real is None else real.mT

        def meet(sums: tuple[Array, Array], queries: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
            (dk, dv), (q, gradient, lse, centre, dq) = sums, queries
            # logits of keys by queries: no product turns them, which takes CPUs twice as long
            weights = jnp.exp(_logits(k, q, real, scale) - lse[..., None, :])
            dlogits = weights * (_product("BNSK,BNLK->BNSL", v, gradient) - centre[..., None, :])
            dlogits = (dlogits * scale).astype(q.dtype)
            dk += _product("BNSL,BNLK->BNSK", dlogits, q)
            dv += _product("BNSL,BNLK->BNSK", weights.astype(v.dtype), gradient)
            return (dk, dv), dq + _product("BNKS,BNSL->BNKL", turned, dlogits)

        zeros = jnp.zeros(k.shape, jnp.float32)
        (dk, dv), dq = _over(meet, (zeros, zeros), (*known, dq))
        return dq, (dk, dv)

    dq = jnp.zeros(known[0].mT.shape, jnp.float32)
    dq, (dk, dv) = _over(of_keys, dq, _columns(k, v, real, columns))
    dq, dk, dv = (_joined(part, whole.shape[1]).astype(dtype) for part, whole in ((dq.mT, q), (dk, k), (dv, v)))
    return dq, dk, dv


def _heads(q: Float[Array, "B L N K"], k: Float[Array, "B S N K"], logits: int) -> int:
    """Returns how many heads of all samples are met at a time: on CPUs as many as all logits of are held, or one.

    A product of many large matrices takes CPUs longer than each alone, small ones take less together.
    """
    heads = q.shape[0] * q.shape[2]
    return _even(heads, max(1, logits // (q.shape[1] * k.shape[1]))) if platform() == "cpu" else heads


def _over_heads(
    run: Callable, heads: tuple[Array, ...], rows: tuple[Array, ...], real: Array | None, at_once: int
) -> Any:
    """Returns what `run(q, k, v, real, ...)` gives, called for so many heads at once."""
    B, _, N, _ = heads[0].shape
    by_head = [rearrange(x, "B L N K -> (B N) 1 L 1 K") for x in heads]
    by_row = [rearrange(x, "B N L -> (B N) 1 1 L") for x in rows]
    known = None if real is None else jnp.repeat(jnp.broadcast_to(real, (B, real.shape[1])), N, axis=0)[:, None]

    def one(given: tuple[list[Array], list[Array], Array | None]) -> Any:
        (q, k, v, *rest), rows, real = given
        return run(q, k, v, real, *rest, *rows)

    def joined(found: Array) -> Array:
        return rearrange(found, "(B N) 1 L 1 K -> B L N K" if found.ndim == 5 else "(B N) 1 1 L -> B N L", B=B)

    return jax.tree.map(joined, jax.lax.map(one, (by_head, by_row, known), batch_size=at_once))


def _sizes(q: Array, k: Array, logits: int) -> tuple[int, int]:
    """Returns how many queries and keys a chunk has."""
    heads = q.shape[0] * q.shape[2]
    columns = _even(k.shape[1], min(KEYS, max(128, logits // (128 * heads))))
    return _even(q.shape[1], max(128, logits // (columns * heads))), columns


def _even(length: int, most: int) -> int:
    """Returns the size of the fewest equal chunks of at most so many."""
    return -(-length // -(-length // most))


def _split(x: Float[Array, "B L N K"], size: int) -> Float[Array, "steps B N size K"]:
    wide = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)))
    return rearrange(wide, "B (steps L) N K -> steps B N L K", L=size)


def _split_rows(x: Float[Array, "B N L"], size: int) -> Float[Array, "steps B N size"]:
    return rearrange(jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % size))), "B N (steps L) -> steps B N L", L=size)


def _joined(parts: Float[Array, "steps B N size K"], length: int) -> Float[Array, "B L N K"]:
    return rearrange(parts, "steps B N L K -> B (steps L) N K")[:, :length]


def _columns(k: Array, v: Array, real: Array | None, size: int) -> tuple[Array, Array, Array | None]:
    """Returns chunks of keys and values, and which of them are real; None for all."""
    missing = -k.shape[1] % size
    if real is None and missing:
        real = jnp.ones((1, k.shape[1]), bool)
    if real is not None:
        real = rearrange(jnp.pad(real, ((0, 0), (0, missing))), "B (steps S) -> steps B 1 1 S", S=size)
    return _split(k, size), _split(v, size), real


def _logits(
    rows: Float[Array, "B N L K"], columns: Float[Array, "B N S K"], real: Array | None, scale: float
) -> Float[Array, "B N L S"]:
    logits = _product("BNLK,BNSK->BNLS", rows, columns) * scale
    return logits if real is None else jnp.where(real, logits, -jnp.inf)


def _over(body: Callable, carry: Any, steps: Any) -> tuple[Any, Any]:
    """Returns what `jax.lax.scan` does; a single step is no loop."""
    if len(jax.tree.leaves(steps)[0]) > 1:
        return jax.lax.scan(body, carry, steps)
    carry, found = body(carry, jax.tree.map(lambda part: part[0], steps))
    return carry, jax.tree.map(lambda part: part[None], found)
