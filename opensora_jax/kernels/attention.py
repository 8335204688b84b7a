"""One attention call for every model. The backend is chosen here and named once in the log.

Every device runs XLA's fused form of the reference today; faster kernels enter this file and no other.
"""

import functools
import logging

import jax
from jax import Array
from jaxtyping import Bool, Float

from opensora_jax.kernels import reference


@functools.cache
def _announce(backend: str, device: str) -> None:
    logging.getLogger("absl").info("attention on %s: %s backend", device, backend)


def attention(
    q: Float[Array, "B L N K"],
    k: Float[Array, "B S N K"],
    v: Float[Array, "B S N K"],
    *,
    mask: Bool[Array, "#B #N #L S"] | None = None,
    bias: Float[Array, "#B #N L S"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B L N K"]:
    """Returns attention of `q` over `k`, `v`, head by head, in the dtype of `v`. See `reference.attention`."""
    _announce("reference (XLA)", jax.default_backend())
    return reference.attention(q, k, v, mask=mask, bias=bias, scale=scale)
