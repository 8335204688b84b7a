"""What queries and keys go through before attention, in one pass on TPUs: RMS norm of each head, gain, rotation.

XLA computes the same in some ten passes: it moves every head to rows of its own and back, since norms and rotations
stay within a head, and halves of a head are no whole registers. Here heads stay in the columns where a linear layer
leaves them and where the flash kernels read them; a rotation is a roll of lanes. The figures are in docs/kernels.md.

`cos` and `sin` have a number for every channel of a head: a channel becomes `cos` of itself plus `sin` of its partner,
which is half a head away, or in Flux's layout (`pairs`) its neighbour.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from opensora_jax.kernels.blocks import LANES
from opensora_jax.kernels.operands import in_parts

BLOCK_BYTES = 3 * 2**19  # of an array in a grid step: three arrays, each twice, stay within 16 MiB of VMEM


def forward(
    x: Float[Array, "B L C"],
    gain: Float[Array, "K"],
    cos: Float[Array, "#B L K"],
    sin: Float[Array, "#B L K"],
    *,
    eps: float,
    pairs: bool,
) -> Float[Array, "B L C"]:
    """Returns the heads of `x`, normalised, times `gain`, rotated; K is a multiple of 128 and divides C."""
    kernel = functools.partial(_forward, channels=len(gain), eps=eps, pairs=pairs)
    return _call(kernel, (x,), gain, cos, sin, "prologue_forward")[0]


def backward(
    x: Float[Array, "B L C"],
    gain: Float[Array, "K"],
    cos: Float[Array, "#B L K"],
    sin: Float[Array, "#B L K"],
    gradient: Float[Array, "B L C"],
    *,
    eps: float,
    pairs: bool,
) -> tuple[Float[Array, "B L C"], Float[Array, "K"]]:
    """Returns the gradients of `x` and `gain` from that of the result."""
    kernel = functools.partial(_backward, channels=len(gain), length=x.shape[1], eps=eps, pairs=pairs)
    dx, parts = _call(kernel, (x, gradient), gain, cos, sin, "prologue_backward", of_gain=True)
    return dx, parts.sum((0, 1)).astype(gain.dtype)


def _call(
    kernel: Any,
    arrays: tuple[Array, ...],
    gain: Array,
    cos: Array,
    sin: Array,
    name: str,
    *,
    of_gain: bool = False,
) -> Sequence[Array]:
    """Returns what a kernel makes of blocks of rows, and with `of_gain` also a row of float32 for every block."""
    (B, L, C), dtype = arrays[0].shape, arrays[0].dtype
    rows = max(8, min(BLOCK_BYTES // (C * dtype.itemsize), 512) // LANES * LANES)
    rows = min(rows, -(-L // 8) * 8)
    steps = -(-L // rows)
    tokens = pl.BlockSpec((None, rows, C), lambda b, i: (b, i, 0))
    angles = pl.BlockSpec((None, rows, len(gain)), lambda b, i: (b if len(cos) > 1 else 0, i, 0))
    whole = pl.BlockSpec((1, len(gain)), lambda b, i: (0, 0))
    one = pl.BlockSpec((None, 1, len(gain)), lambda b, i: (b * steps + i, 0, 0))
    return pl.pallas_call(
        kernel,
        grid=(B, steps),
        in_specs=[*[tokens] * len(arrays), whole, angles, angles],
        out_specs=[tokens, *[one] * of_gain],
        out_shape=[
            jax.ShapeDtypeStruct((B, L, C), dtype),
            *[jax.ShapeDtypeStruct((B * steps, 1, len(gain)), jnp.float32)] * of_gain,
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=20 * arrays[0].size,
            transcendentals=arrays[0].size // len(gain),
            bytes_accessed=(len(arrays) + 1) * arrays[0].size * dtype.itemsize,
        ),
        name=name,
    )(*arrays, gain.astype(dtype)[None], cos, sin)


def _forward(x: Any, gain: Any, cos: Any, sin: Any, out: Any, *, channels: int, eps: float, pairs: bool) -> None:
    def head(part: Any, _: None) -> None:
        rounded = _normalised(x[:, part], eps)[0].astype(x.dtype).astype(jnp.float32)
        gained = (rounded * gain[...].astype(jnp.float32)).astype(x.dtype).astype(jnp.float32)
        out[:, part] = (gained * cos[...] + _partner(gained, pairs) * sin[...]).astype(out.dtype)

    in_parts(x.shape[1], channels, head)


def _backward(
    x: Any,
    gradient: Any,
    gain: Any,
    cos: Any,
    sin: Any,
    dx: Any,
    dgain: Any,
    *,
    channels: int,
    length: int,
    eps: float,
    pairs: bool,
) -> None:
    inside = jax.lax.broadcasted_iota(jnp.int32, (len(x), 1), 0) < length - pl.program_id(1) * len(x)

    def head(part: Any, total: Array) -> Array:
        normed, inverse = _normalised(x[:, part], eps)
        turned = gradient[:, part].astype(jnp.float32)
        turned = turned * cos[...] + _partner(turned * sin[...], pairs)  # back by the same angle
        total += jnp.where(inside, turned * normed.astype(x.dtype).astype(jnp.float32), 0.0).sum(0, keepdims=True)
        turned = turned * gain[...].astype(jnp.float32)
        dx[:, part] = (inverse * (turned - normed * (turned * normed).mean(1, keepdims=True))).astype(dx.dtype)
        return total

    dgain[...] = in_parts(x.shape[1], channels, head, jnp.zeros((1, channels), jnp.float32))


def _normalised(x: Array, eps: float) -> tuple[Array, Array]:
    """Returns rows with a mean square of one, and what they were multiplied by."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt((wide * wide).mean(1, keepdims=True) + eps)
    return wide * inverse, inverse


def _partner(x: Array, pairs: bool) -> Array:
    """Returns for every channel the one that it is turned with."""
    width = x.shape[1]
    if not pairs:
        return pltpu.roll(x, width // 2, 1)
    even = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) % 2 == 0
    return jnp.where(even, pltpu.roll(x, width - 1, 1), pltpu.roll(x, 1, 1))
