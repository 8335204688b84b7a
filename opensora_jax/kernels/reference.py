"""Attention written out: the definition that every other backend is tested against."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float


def attention(
    q: Float[Array, "B L N K"],
    k: Float[Array, "B S N K"],
    v: Float[Array, "B S N K"],
    *,
    mask: Bool[Array, "#B #N #L S"] | None = None,
    bias: Float[Array, "#B #N L S"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B L N K"]:
    """Returns softmax(scale * q k^T + bias) v with the softmax in float32.

    `mask` is True where a query may look; `scale` is K ** -0.5 unless given (T5 uses 1).
    """
    logits = jnp.einsum("BLNK,BSNK->BNLS", q, k, preferred_element_type=jnp.float32)
    logits *= q.shape[-1] ** -0.5 if scale is None else scale
    if bias is not None:
        logits += bias.astype(jnp.float32)
    if mask is not None:
        logits = jnp.where(mask, logits, -jnp.inf)
    return jnp.einsum("BNLS,BSNK->BLNK", jax.nn.softmax(logits, axis=-1).astype(v.dtype), v)
