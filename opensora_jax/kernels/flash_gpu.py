"""Flash attention on NVIDIA GPUs: cuDNN's, where its conditions hold.

The same kernels as `jax.nn.dot_product_attention(implementation="cudnn")`, called one level below it: the public call
returns the logsumexp in the dtype of the output, which is too coarse to merge blocks by or to start a backward pass
from. Elsewhere (float32, GPUs before Ampere) attention goes by XLA in chunks (chunked.py): Pallas' Triton backend and
jax.experimental.pallas.ops.gpu are deprecated, and tokamax, which takes their place, needs a GPU in the process to
compile, five packages more and pins of its own.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
from jax import Array
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from opensora_jax.kernels.chunked import LOWEST

SETTINGS = {  # of the backward pass: no dropout, no bias, no window, no function of logits
    "seed": 42,
    "dropout_rate": 0.0,
    "variadic_args": (False, False),
    "layout": cudnn.AttentionLayout.BTNH.value,
    "sliding_window_length": None,
    "is_training": True,  # until JAX 0.11
    "score_mod": None,  # since JAX 0.12, with arguments among what is kept
    "cudnn_version": None,
    "return_residual": False,
}


def obstacle(q: Array) -> str | None:
    """Returns why cuDNN cannot attend with such queries in this process, or None if it can."""
    capability = _compute_capability()
    most = 256 if capability[0] == 9 else 128  # wider heads learn on Hopper alone
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN attends in bfloat16 and float16, not in {q.dtype}"
    if capability < (8, 0):
        return "cuDNN attends on GPUs from Ampere on, of which this process sees none"
    if q.shape[-1] % 8 or q.shape[-1] > most:
        return f"cuDNN takes head sizes up to {most} that divide by 8, not {q.shape[-1]}"
    return None


def forward(
    q: Float[Array, "B L N K"],
    k: Float[Array, "B S N K"],
    v: Float[Array, "B S N K"],
    real: Bool[Array, "#B S"] | None,
    *,
    scale: float,
    dtype: DTypeLike,
) -> tuple[Float[Array, "B L N K"], Float[Array, "B N L"]]:
    """Returns attention in `dtype` and the logsumexp of every query's logits; `real` says which keys count."""
    order, lengths = _real_first(q, real)
    k, v = _take(k, order), _take(v, order)
    kind = cudnn.MaskType.NO_MASK if real is None else cudnn.MaskType.PADDING
    out, lse = cudnn.dot_product_attention(
        q, k, v, None, None, *lengths, scale=scale, mask_type=kind, return_residual=True
    )
    if lengths[1] is not None:  # cuDNN says nothing, or NaN, of a sample without keys
        is_none = (lengths[1] == 0)[:, None, None]
        out, lse = jnp.where(is_none[..., None], 0, out), jnp.where(is_none, LOWEST, lse)
    return out.astype(dtype), lse


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
    """Returns the gradients of queries, keys and values in `dtype`, from that of the output.

    `out` and `lse` are those of a query over all keys, these or more.
    """
    order, lengths = _real_first(q, real)
    none = jnp.zeros(0, q.dtype)  # what cuDNN's call takes for "not given"
    counts = tuple(none if count is None else count for count in lengths)
    kind = cudnn.MaskType.NO_MASK if real is None else cudnn.MaskType.PADDING
    names = inspect.signature(cudnn._dot_product_attention_bwd_rule).parameters
    settings = {name: value for name, value in SETTINGS.items() if name in names}
    of_logits = [()] if "score_mod" in names else []
    kept = (q, _take(k, order), _take(v, order), none, *counts, none, none, none, none, *of_logits)
    dq, dk, dv, *_ = cudnn._dot_product_attention_bwd_rule(
        scale=scale,
        mask_type=kind,
        res=(*kept, lse, out.astype(q.dtype)),
        grad_output=gradient.astype(q.dtype),
        **settings,
    )
    if order is not None and real is not None:
        back = jnp.argsort(order, axis=1)
        dk, dv = (jnp.where(real[..., None, None], _take(part, back), 0) for part in (dk, dv))
        dq = jnp.where(real.any(1)[:, None, None, None], dq, 0)
    return dq.astype(dtype), dk.astype(dtype), dv.astype(dtype)


@functools.cache
def _compute_capability() -> tuple[int, ...]:
    """Returns that of this process's GPUs, (0,) without one."""
    try:
        device = jax.local_devices(backend="cuda")[0]
    except RuntimeError:
        return (0,)
    return tuple(map(int, device.compute_capability.split(".")))


def _real_first(q: Array, real: Array | None) -> tuple[Array | None, tuple[Array | None, Array | None]]:
    """Returns an order of keys in which padding comes last, and the lengths of queries and keys of each sample.

    cuDNN knows padding at the end alone, and attention does not depend on the order of keys.
    """
    if real is None:
        return None, (None, None)
    real = jnp.broadcast_to(real, (len(q), real.shape[1]))
    lengths = jnp.full(len(q), q.shape[1], jnp.int32), real.sum(1, dtype=jnp.int32)
    return jnp.argsort(~real, axis=1, stable=True), lengths


def _take(x: Array, order: Array | None) -> Array:
    return x if order is None else jnp.take_along_axis(x, order[..., None, None], axis=1)
