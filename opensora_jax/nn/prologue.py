"""Queries and keys on their way into attention: normalised head by head, then rotated.

On TPUs one kernel does it (kernels/prologue_tpu.py), on each device's own heads; elsewhere, for small heads, and where
the compiler splits anything else it is the norm and the rotation of norm.py and rope.py, whose rounding the kernel
repeats.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array
from jax.sharding import PartitionSpec, get_abstract_mesh
from jaxtyping import Float

from opensora_jax.kernels import prologue_tpu
from opensora_jax.kernels.blocks import LANES
from opensora_jax.kernels.choice import choose_kernel, left_to_compiler, platform
from opensora_jax.kernels.flash_tpu import DTYPES
from opensora_jax.nn.norm import RMSNorm
from opensora_jax.nn.rope import Table, rotate_pairs
from opensora_jax.parallel.gather import is_split_along_tensor

Heads = Float[Array, "B L N K"]


def normed_and_rotated(x: Heads, norm: RMSNorm, table: Table, rotate: Callable[[Heads, Table], Heads]) -> Heads:
    """Returns `rotate(norm(x), table)`, in the dtype of `x`."""
    heads, channels = x.shape[2:]
    mesh, pairs = get_abstract_mesh(), rotate is rotate_pairs
    split = is_split_along_tensor()
    is_ours = heads % mesh.shape["tensor"] == 0 if split else choose_kernel(channels).backend == "flash"
    if platform() != "tpu" or channels % LANES or x.dtype not in DTYPES or not is_ours:
        return rotate(norm(x), table)
    run = partial(_fused, eps=norm.eps, pairs=pairs)
    if split:
        columns, whole = PartitionSpec(None, None, "tensor"), PartitionSpec()
        specs = columns, whole, whole, whole
        run = jax.shard_map(run, in_specs=specs, out_specs=columns, axis_names=left_to_compiler(mesh), check_vma=False)
    turned = run(rearrange(x, "B L N K -> B L (N K)"), norm.scale[...], *by_channel(table, pairs))
    return rearrange(turned, "B L (N K) -> B L N K", K=channels)


def by_channel(table: Table, pairs: bool) -> tuple[Float[Array, "#B L K"], Float[Array, "#B L K"]]:
    """Returns cos and signed sin for every channel of a head from those of a rotation's angles."""
    cos, sin = (part if part.ndim == 3 else part[None] for part in table)
    join = partial(_interleaved if pairs else jnp.concatenate, axis=-1)
    return join([cos, cos]), join([-sin, sin])


def _interleaved(parts: list[Array], axis: int) -> Array:
    return jnp.stack(parts, axis).reshape(*parts[0].shape[:-1], -1)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _fused(x: Array, gain: Array, cos: Array, sin: Array, eps: float, pairs: bool) -> Array:
    return prologue_tpu.forward(x, gain, cos, sin, eps=eps, pairs=pairs)


def _fused_forward(x: Array, gain: Array, cos: Array, sin: Array, eps: float, pairs: bool) -> tuple[Array, tuple]:
    return _fused(x, gain, cos, sin, eps, pairs), (x, gain, cos, sin)


def _fused_backward(eps: float, pairs: bool, kept: tuple[Array, ...], gradient: Array) -> tuple:
    x, gain, cos, sin = kept
    return (*prologue_tpu.backward(x, gain, cos, sin, gradient, eps=eps, pairs=pairs), None, None)


_fused.defvjp(_fused_forward, _fused_backward)
