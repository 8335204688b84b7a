"""Flash attention on TPUs, backwards: one Pallas kernel for the gradients of queries, keys and values.

JAX's splash attention takes two kernels of seven products of blocks, or one that writes the gradient of queries once
per block of keys. Here one kernel of five products adds them up in float32 where they lie: the block of a gradient is
read, added to and written back, by an input and an output that share their memory. Heads are independent, so both
cores of a v4 or v5p take part, where splash runs on one. The figures are in docs/kernels.md.

Source: Dao 2023 (FlashAttention-2, arXiv:2307.08691); the shared memory is as in tokamax's splash attention, which adds
up in the dtype of queries and in three parts.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from opensora_jax.kernels.blocks import Blocks, device_kind, fit, largest
from opensora_jax.kernels.operands import LOG2E, Padding, column, cost, dot, in_parts, layout, padding, zeroed

# A block of the gradient of queries is written back up to two steps after it was computed and read one step early.
STEPS_APART = 4


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
    most: Blocks | None = None,
) -> tuple[Float[Array, "B L N K"], Float[Array, "B S N K"], Float[Array, "B S N K"]]:
    """Returns the gradients of queries, keys and values in `dtype`, from that of the output.

    `out` and `lse` are of attention over all keys, these or more. `most` replaces the table of blocks.
    """
    (B, L, N, _), S, at = q.shape, k.shape[1], layout(q)
    most = most or largest(at.width * q.dtype.itemsize, device_kind())[1]
    blocks, query_steps, steps = fit(most, L, S, least_steps=STEPS_APART)
    rows = query_steps * blocks.queries
    mask, counts, known = padding(real, S, blocks.keys, B * N)
    by_query, by_key = at.spec(blocks.queries, lambda h, j, i: (h, i)), at.spec(blocks.keys, lambda h, j, i: (h, j))
    per_query = pl.BlockSpec((None, 1, blocks.queries), lambda h, j, i, *_: (h, 0, i))
    upright = pl.BlockSpec((None, at.width, blocks.queries), lambda h, j, i, *_: (h, 0, i))
    centre = jnp.einsum("BLNK,BLNK->BNL", gradient, out, preferred_element_type=jnp.float32)
    beyond = query_steps - -(-L // blocks.queries)  # blocks without a query, which would lie outside of the arrays
    queries, gradients = (_longer(x, beyond * blocks.queries) for x in (q, gradient.astype(q.dtype)))
    keys = at.pack(k)
    inputs: list[Array] = [at.pack(queries), keys, at.pack(v), at.pack(gradients)]
    inputs += [at.rows(lse * LOG2E, rows), at.rows(centre, rows), jax.lax.empty((B * N, at.width, rows), jnp.float32)]
    dq, dk, dv = pl.pallas_call(
        functools.partial(
            _kernel, mask=mask, length=queries.shape[1], steps=(query_steps, steps), scale=scale, blocks=blocks
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(counts),
            grid=(B * N, steps, query_steps),
            in_specs=[
                *(by_query, by_key, by_key, by_query, per_query, per_query, upright),
                *mask.specs(lambda h, j, i: (h, j)),
            ],
            out_specs=[upright, by_key, by_key],
            scratch_shapes=[pltpu.VMEM((blocks.keys, at.width), jnp.float32)] * 2,
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B * N, at.width, rows), jnp.float32),
            *[jax.ShapeDtypeStruct(keys.shape, dtype)] * 2,
        ],
        input_output_aliases={len(counts) + len(inputs) - 1: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        cost_estimate=cost(5, q, k),
        name="flash_backward",
    )(*counts, *inputs, *known)
    dq = rearrange(dq * scale, "(B N) K L -> B L N K", B=B)[:, :L, :, : at.channels].astype(dtype)
    return dq, at.unpack(dk), at.unpack(dv)


def _longer(x: Float[Array, "B L N K"], by: int) -> Float[Array, "B M N K"]:
    return jnp.pad(x, ((0, 0), (0, by), (0, 0), (0, 0))) if by else x


def _kernel(*refs: Any, mask: Padding, length: int, steps: tuple[int, int], scale: float, blocks: Blocks) -> None:
    counts, (q, k, v, gradient, lse, centre, before), real, (dq, dk, dv, keys, values) = mask.split(refs, 7)
    head, step, at = pl.program_id(0), pl.program_id(1), pl.program_id(2)

    @pl.when(at == 0)
    def _() -> None:
        keys[...] = jnp.zeros_like(keys)
        values[...] = jnp.zeros_like(values)

    dq[...] = jnp.where(step == 0, 0.0, before[...])  # nothing was written before the first step

    def meet(masked: bool) -> None:
        queries, gradients = q[...], gradient[...]
        if masked and length % blocks.queries:
            inside = jax.lax.broadcasted_iota(jnp.int32, (blocks.queries, 1), 0) < length - at * blocks.queries
            queries, gradients = zeroed(queries, inside), zeroed(gradients, inside)

        def chunk(part: Any, _: None) -> None:
            known = column(real[:, part]) if masked and mask.masked else None
            of_k, of_v = (x[part, :] if known is None else zeroed(x[part, :], known) for x in (k, v))
            # logits lie with a row per key: then only the small operand of the product for dq is turned
            logits = dot(of_k, queries, 1, 1) * (scale * LOG2E)
            if known is not None:
                logits = jnp.where(known, logits, -jnp.inf)
            weights = jnp.exp2(logits - lse[...])
            values[part, :] += dot(weights.astype(gradients.dtype), gradients, 1, 0)
            dlogits = (weights * (dot(of_v, gradients, 1, 1) - centre[...])).astype(q.dtype)
            keys[part, :] += dot(dlogits, queries, 1, 0)
            dq[...] += dot(of_k, dlogits, 0, 0)

        in_parts(blocks.keys, blocks.chunk, chunk, unroll=not masked)

    whole = (at + 1) * blocks.queries <= length if steps[0] * blocks.queries > length else True
    mask.meet(counts, head, step, steps[1], whole, meet)

    @pl.when(at == steps[0] - 1)
    def _() -> None:
        dk[...] = (keys[...] * scale).astype(dk.dtype)
        dv[...] = values[...].astype(dv.dtype)
