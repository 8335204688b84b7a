"""One attention call for every model. The backend is chosen here (choice.py) and named once in the log.

Flash attention (flash.py) runs in Pallas on TPUs, by cuDNN on GPUs and by XLA in chunks elsewhere; what it cannot do,
or what is too small to gain, goes to the reference (reference.py).
"""

from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float

from opensora_jax.kernels import reference
from opensora_jax.kernels.choice import announce, choose, platform
from opensora_jax.kernels.flash import ATTENTION, flash_attention


def attention(
    q: Float[Array, "B L N K"],
    k: Float[Array, "B S N K"],
    v: Float[Array, "B S N K"],
    *,
    mask: Bool[Array, "#B #N #L S"] | None = None,
    bias: Float[Array, "#B #N L S"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B L N K"]:
    """Returns attention of `q` over `k`, `v`, head by head, in the dtype of `v`. See `reference.attention`.

    A sample whose keys are all masked has no answer: it gets zeros from a kernel, NaN from the reference.
    Raises: ValueError for shapes that do not fit together.
    """
    check_shapes(q, k, v, mask, bias)
    backend, reason = choose(q, k, v, mask, bias)
    if backend == "reference":
        announce("reference", reason, platform())
        return checkpoint_name(reference.attention(q, k, v, mask=mask, bias=bias, scale=scale), ATTENTION)
    real = None if mask is None else mask[:, 0, 0]
    return flash_attention(q, k, v, real, q.shape[-1] ** -0.5 if scale is None else scale)


def check_shapes(q: Array, k: Array, v: Array, mask: Array | None, bias: Array | None) -> None:
    """Raises: ValueError for shapes that do not fit together, naming them."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            "attention takes queries of shape (batch, length, heads, head size), and keys and values of one shape that "
            f"differs from it in length alone: got {q.shape}, {k.shape} and {v.shape}"
        )
    logits = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    for name, given in (("mask", mask), ("bias", bias)):
        if given is None:
            continue
        fits = given.ndim == 4 and all(size in (1, whole) for size, whole in zip(given.shape, logits, strict=True))
        if not fits or given.shape[3] != logits[3]:
            raise ValueError(
                f"the {name} of attention must have the shape of its logits, {logits}, or 1 in place of any but the "
                f"last: got {given.shape}"
            )
