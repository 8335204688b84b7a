"""What the TPU kernels are given: where heads lie, which keys are padding, and what lies beyond the last token."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Bool, Float

from opensora_jax.kernels.blocks import LANES

LOG2E = math.log2(math.e)  # the hardware has powers of two


class Layout(NamedTuple):
    """Where a kernel finds a head: in the columns of its sample, as a linear layer leaves it, or in rows of its own.

    Heads of whole registers stay in columns; others are put first, so that nothing has to be moved in registers.
    """

    samples: int
    heads: int
    channels: int

    @property
    def in_columns(self) -> bool:
        """Says whether the heads of a sample lie side by side."""
        return self.channels % LANES == 0

    @property
    def width(self) -> int:
        """Channels of a head, with padding."""
        return self.channels if self.in_columns else -(-self.channels // 64) * 64

    def pack(self, x: Float[Array, "B L N K"]) -> Float[Array, "G L C"]:
        """Returns samples of heads as the kernels read them."""
        if self.in_columns:
            return rearrange(x, "B L N K -> B L (N K)")
        return rearrange(jnp.pad(x, ((0, 0),) * 3 + ((0, self.width - self.channels),)), "B L N K -> (B N) L K")

    def unpack(self, x: Float[Array, "G L C"]) -> Float[Array, "B L N K"]:
        """Returns what `pack` was given."""
        if self.in_columns:
            return rearrange(x, "B L (N K) -> B L N K", N=self.heads)
        return rearrange(x, "(B N) L K -> B L N K", N=self.heads)[..., : self.channels]

    def spec(self, block: int, where: Callable[..., tuple[Any, Any]]) -> pl.BlockSpec:
        """Returns a block of tokens of one head; `where` maps indices of the grid to a head and a block."""

        def at(*grid: Any) -> tuple[Any, Any, Any]:
            head, step = where(*grid[:3])
            if not self.in_columns:
                return head, step, 0
            return jax.lax.div(head, self.heads), step, jax.lax.rem(head, self.heads)

        return pl.BlockSpec((None, block, self.width), at)

    def rows(self, x: Float[Array, "B N L"], tokens: int) -> Float[Array, "H 1 M"]:
        """Returns a number per token, with zeros up to so many."""
        return rearrange(jnp.pad(x, ((0, 0), (0, 0), (0, tokens - x.shape[2]))), "B N L -> (B N) 1 L")


def layout(x: Float[Array, "B L N K"]) -> Layout:
    """Returns the layout for heads like these."""
    return Layout(x.shape[0], x.shape[2], x.shape[3])


class Padding(NamedTuple):
    """How kernels learn which keys are real: a count per block, in scalar memory, and 1 or 0 per key.

    `per_sample` heads share a row of keys. Blocks of real keys alone run as if there were no mask.
    """

    masked: bool
    per_sample: int
    block: int

    def specs(self, where: Callable[..., tuple[Any, Any]]) -> list[pl.BlockSpec]:
        """Returns how keys are read, if at all; `where` maps indices of the grid to a head and a block of keys."""

        def at(*grid: Any) -> tuple[Any, Any, Any]:
            head, step = where(*grid[:3])
            return jax.lax.div(head, self.per_sample), 0, step

        return [pl.BlockSpec((None, 1, self.block), at)] * self.masked

    def split(self, refs: tuple[Any, ...], inputs: int) -> tuple[Any, tuple[Any, ...], Any, tuple[Any, ...]]:
        """Returns a kernel's references: counts, so many inputs, keys, the rest; None for what is not there."""
        if not self.masked:
            return None, refs[:inputs], None, refs[inputs:]
        return refs[0], refs[1 : inputs + 1], refs[inputs + 1], refs[inputs + 2 :]

    def meet(self, counts: Any, head: Any, step: Any, steps: int, whole: Any, run: Callable[[bool], None]) -> None:
        """Calls `run(masked)` in a kernel, not at all for a block without real keys.

        `whole` says whether all queries of the block are real; True, not traced, if those of every block are.
        """
        if not self.masked and whole is True:
            run(False)
            return
        real = counts[jax.lax.div(head, self.per_sample) * steps + step] if self.masked else self.block
        clean = (real == self.block) & whole
        pl.when(clean)(lambda: run(False))
        pl.when((real > 0) & jnp.logical_not(clean))(lambda: run(True))


def padding(
    real: Bool[Array, "#B S"] | None, length: int, block: int, heads: int
) -> tuple[Padding, list[Array], list[Array]]:
    """Returns the padding of `length` keys, of which `real` names those that count, up to a multiple of `block`.

    The lists hold the counts and the keys for the kernel, and nothing when all keys are real.
    """
    if real is None and length % block == 0:
        return Padding(False, 1, block), [], []
    known = np.ones((1, length), bool) if real is None else real
    known = jnp.pad(known, ((0, 0), (0, -length % block)))
    counts = known.reshape(-1, block).sum(1, dtype=jnp.int32)
    return Padding(True, heads // len(known), block), [counts], [known[:, None].astype(jnp.float32)]


def column(row: Array) -> Array:
    """Returns which numbers of a row `(1, n)` are above zero, as a column."""
    return jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1] > 0


def zeroed(x: Array, rows: Array) -> Array:
    """Returns the given rows of a block and zeros in place of others, which may hold anything."""
    return jnp.where(rows, x.astype(jnp.float32), 0.0).astype(x.dtype)


def in_parts(length: int, size: int, run: Callable[[Any, Any], Any], start: Any = None, *, unroll: bool = False) -> Any:
    """Returns what `run(part, so far)` leaves in a kernel after all parts of a block's axis, whole registers each.

    Unrolled, parts overlap; a loop compiles faster.
    """

    def step(index: Any, known: Any) -> Any:
        return run(pl.ds(pl.multiple_of(index * size, LANES), size), known)

    return jax.lax.fori_loop(0, length // size, step, start, unroll=unroll)


def dot(a: Array, b: Array, over_a: int, over_b: int) -> Array:
    """Returns the float32 product of two matrices over the given axes."""
    return jax.lax.dot_general(a, b, (((over_a,), (over_b,)), ((), ())), preferred_element_type=jnp.float32)


def cost(products: int, q: Float[Array, "B L N K"], k: Float[Array, "B S N K"]) -> pl.CostEstimate:
    """Returns what a kernel of so many products of queries with keys costs, for the compiler's schedule."""
    logits = q.size // q.shape[3] * k.shape[1]
    arrays = products * (q.size + k.size) * q.dtype.itemsize
    return pl.CostEstimate(flops=2 * products * logits * q.shape[3], transcendentals=logits, bytes_accessed=arrays)
