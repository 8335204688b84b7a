"""Attention that keeps no logits, on whatever platform a program is compiled for.

`forward` and `backward` are what a block of keys adds to attention: ring attention merges the blocks of several
devices by their logsumexp, `flash_attention` is the case of one block. The platform is that of lowering, so that a
program can be compiled for TPUs on a machine without one; branches for other platforms are traced and then dropped.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from opensora_jax.kernels import chunked, flash_gpu, flash_tpu
from opensora_jax.kernels.choice import announce, choose_kernel, platform

# What policies of rematerialisation call the result of attention, and the small sums that its gradients need.
ATTENTION, STATISTICS = "attention", "attention_statistics"


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def flash_attention(
    q: Float[Array, "B L N K"],
    k: Float[Array, "B S N K"],
    v: Float[Array, "B S N K"],
    real: Bool[Array, "#B S"] | None,
    scale: float,
) -> Float[Array, "B L N K"]:
    """Returns attention over the keys that are `real`, all if None, in the dtype of `v`."""
    return forward(q, k, v, real, scale=scale, dtype=v.dtype)[0]


def _forward(q: Array, k: Array, v: Array, real: Array | None, scale: float) -> tuple[Array, tuple[Any, ...]]:
    # Where a policy keeps these two, the backward pass of a layer does not run the forward kernel again.
    out, lse = forward(q, k, v, real, scale=scale, dtype=v.dtype)
    out, lse = checkpoint_name(out, ATTENTION), checkpoint_name(lse, STATISTICS)
    return out, (q, k, v, real, out, lse)


def _backward(scale: float, kept: tuple[Any, ...], gradient: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, real, out, lse = kept
    return (*backward(q, k, v, real, gradient, out, lse, scale=scale, dtype=q.dtype), None)


flash_attention.defvjp(_forward, _backward)


def forward(
    q: Float[Array, "B L N K"],
    k: Float[Array, "B S N K"],
    v: Float[Array, "B S N K"],
    real: Bool[Array, "#B S"] | None,
    *,
    scale: float,
    dtype: DTypeLike,
) -> tuple[Float[Array, "B L N K"], Float[Array, "B N L"]]:
    """Returns attention over a block of keys in `dtype`, and the logsumexp of every query's logits.

    A sample without real keys gets zeros and a logsumexp near -1e30, so that it counts for nothing in a merge.
    """
    return _by_platform("forward", q, k, v, real, scale=scale, dtype=dtype)


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
) -> tuple[Float[Array, "B L N K"], Float[Array, "B S N K"], Float[Array, "B S N K"]]:
    """Returns what a block of keys adds to the gradients of queries, keys and values, in `dtype`.

    `gradient`, `out` and `lse` are of attention over all keys, of this block and others.
    """
    return _by_platform("backward", q, k, v, real, gradient, out, lse, scale=scale, dtype=dtype)


def _by_platform(direction: str, q: Array, *arrays: Any, scale: float, dtype: DTypeLike) -> Any:
    def on(backend: ModuleType) -> Callable[..., Any]:
        return partial(getattr(backend, direction), scale=scale, dtype=dtype)

    backend, reason = choose_kernel(q.shape[-1])
    if backend == "chunked":
        announce("XLA in chunks", reason, platform())
        return on(chunked)(q, *arrays)
    obstacles = {"tpu": flash_tpu.obstacle(q), "gpu": flash_gpu.obstacle(q)}
    names = {"tpu": ("Pallas flash attention", reason), "gpu": ("cuDNN", reason)}
    names |= {name: ("XLA in chunks", obstacle) for name, obstacle in obstacles.items() if obstacle}
    announce(*names.get(platform(), ("XLA in chunks", "it has no kernel of its own")), platform())
    tpu, cuda = (
        on(chunked if obstacles[name] else module) for name, module in (("tpu", flash_tpu), ("gpu", flash_gpu))
    )
    return jax.lax.platform_dependent(q, *arrays, tpu=tpu, cuda=cuda, default=on(chunked))
