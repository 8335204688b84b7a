"""Flash attention on TPUs, forwards: a Pallas kernel that never writes logits to memory.

The splash kernel that comes with JAX was the model. Without masks inside blocks, with sums kept per lane and a compact
logsumexp this one takes fewer cycles and less memory; the backward pass (flash_tpu_backward.py) gains much more.
The figures are in docs/kernels.md.

Source: Dao 2023 (FlashAttention-2, arXiv:2307.08691); jax.experimental.pallas.ops.tpu.splash_attention.
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

from opensora_jax.kernels.blocks import LANES, Blocks, device_kind, fit, largest
from opensora_jax.kernels.chunked import LOWEST
from opensora_jax.kernels.flash_tpu_backward import backward
from opensora_jax.kernels.operands import LOG2E, Padding, column, cost, dot, in_parts, layout, padding, zeroed

__all__ = ["backward", "forward"]

DTYPES = (jnp.bfloat16, jnp.float32)


def obstacle(q: Array) -> str | None:
    """Returns why the kernel cannot attend with such queries, or None if it can."""
    return None if q.dtype in DTYPES else f"TPUs attend in bfloat16 and float32, not in {q.dtype}"


def forward(
    q: Float[Array, "B L N K"],
    k: Float[Array, "B S N K"],
    v: Float[Array, "B S N K"],
    real: Bool[Array, "#B S"] | None,
    *,
    scale: float,
    dtype: DTypeLike,
    most: Blocks | None = None,
) -> tuple[Float[Array, "B L N K"], Float[Array, "B N L"]]:
    """Returns attention in `dtype` and the logsumexp of every query's logits; `real` says which keys count.

    A sample without real keys gets zeros and a logsumexp near -1e30. `most` replaces the table of blocks.
    """
    (B, L, N, _), S, at = q.shape, k.shape[1], layout(q)
    blocks, query_steps, steps = fit(most or largest(at.width * q.dtype.itemsize, device_kind())[0], L, S)
    mask, counts, known = padding(real, S, blocks.keys, B * N)
    by_query, by_key = at.spec(blocks.queries, lambda h, i, j: (h, i)), at.spec(blocks.keys, lambda h, i, j: (h, j))
    scratch = [(blocks.queries, width) for width in (LANES, LANES, at.width)]
    queries = at.pack(q)
    out, lse = pl.pallas_call(
        functools.partial(_kernel, mask=mask, steps=steps, scale=scale, blocks=blocks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(counts),
            grid=(B * N, query_steps, steps),
            in_specs=[by_query, by_key, by_key, *mask.specs(lambda h, i, j: (h, j))],
            out_specs=[by_query, pl.BlockSpec((None, 1, blocks.queries), lambda h, i, j, *_: (h, 0, i))],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(queries.shape, dtype),
            jax.ShapeDtypeStruct((B * N, 1, query_steps * blocks.queries), jnp.float32),
        ],
        # both cores of a v4 or v5p take part; keys come last, so that a query meets its keys one after another
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=cost(2, q, k),
        name="flash_forward",
    )(*counts, queries, at.pack(k), at.pack(v), *known)
    return at.unpack(out), rearrange(lse, "(B N) 1 L -> B N L", B=B)[..., :L]


def _kernel(*refs: Any, mask: Padding, steps: int, scale: float, blocks: Blocks) -> None:
    counts, (q, k, v), real, (out, lse, peak, total, seen) = mask.split(refs, 3)
    head, step = pl.program_id(0), pl.program_id(2)

    @pl.when(step == 0)
    def _() -> None:
        peak[...] = jnp.full_like(peak, LOWEST)
        total[...] = jnp.zeros_like(total)
        seen[...] = jnp.zeros_like(seen)

    def meet(masked: bool) -> None:
        def chunk(part: Any, _: None) -> None:
            logits = dot(q[...], k[part, :], 1, 1) * (scale * LOG2E)
            if masked:
                logits = jnp.where(real[:, part] > 0, logits, -jnp.inf)
            higher = jnp.maximum(peak[...], logits.max(1, keepdims=True))
            weights, shrink = jnp.exp2(logits - _wide(higher, blocks.chunk)), jnp.exp2(peak[...] - higher)
            peak[...] = higher
            # sums stay apart per lane until the end: adding up lanes takes another unit and its results wait
            by_lane = sum(weights[:, lane : lane + LANES] for lane in range(0, blocks.chunk, LANES))
            total[...] = total[...] * shrink + by_lane
            values = zeroed(v[part, :], column(real[:, part])) if masked else v[part, :]
            seen[...] = seen[...] * _wide(shrink, seen.shape[1]) + dot(weights.astype(v.dtype), values, 1, 0)

        in_parts(blocks.keys, blocks.chunk, chunk, unroll=not masked)

    mask.meet(counts, head, step, steps, True, meet)

    @pl.when(step == steps - 1)
    def _() -> None:
        weight = jnp.maximum(total[...].sum(1, keepdims=True), 1.0)  # the largest logit alone adds 1
        out[...] = (seen[...] / weight).astype(out.dtype)
        lse[...] = ((peak[...] + jnp.log2(weight)) / LOG2E).T[:1]


def _wide(x: Array, width: int) -> Array:
    """Returns a register's width of equal columns as `width` of them."""
    return jnp.tile(x, (1, -(-width // LANES)))[:, :width]
