"""Attention of one head over the positions of this and earlier frames, in memory that does not grow with the video.

A long video has more pairs of positions than fit anywhere: 129 frames of 576 x 1024 pixels are 304,128 positions of a
Hunyuan latent, whose weights alone would be 370 GB. So the queries of one frame at a time go over chunks of keys, with
a running maximum and sum. Rows and columns stay axes of the queries: devices that share them keep their own, and
gather keys and values alone.
Source: FlashAttention (Dao et al. 2022, arXiv:2205.14135), algorithm 1, here for the compiler.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array
from jaxtyping import Bool, Float

from opensora_jax.kernels.attention import attention

LARGEST = 2**24  # pairs of a query and a key that are computed at a time
LANES = 128  # of a TPU, which chunks of keys fill


def frame_causal_attention(
    q: Float[Array, "B T H W C"], k: Float[Array, "B T H W C"], v: Float[Array, "B T H W C"]
) -> Float[Array, "B T H W C"]:
    """Returns attention of every position over those of its own frame and of all before, in the dtype of `v`."""
    B, T, H, W, _ = q.shape
    if B * (T * H * W) ** 2 <= LARGEST:
        flat = (rearrange(a, "B T H W C -> B (T H W) 1 C") for a in (q, k, v))
        return attention(*flat, mask=frame_causal_mask(T, H * W)[None, None]).reshape(q.shape)
    size = LARGEST // (B * H * W)
    return _by_frames(q, k, v, size=size // LANES * LANES or max(1, size))


def frame_causal_mask(frames: int, positions: int) -> Bool[Array, "L L"]:
    """Returns which query (first axis) sees which key: all `positions` of its own frame and of those before."""
    frame = jnp.arange(frames * positions) // positions
    return frame[:, None] >= frame[None, :]


class _Seen(NamedTuple):
    """What a frame's queries know of the keys so far: the largest logit, the sum of weights, the weighted values."""

    peak: Float[Array, "B H W"]
    total: Float[Array, "B H W"]
    mixed: Float[Array, "B H W C"]


def _by_frames(q: Array, k: Array, v: Array, size: int) -> Array:
    """Goes over frames of queries and chunks of `size` keys, but for those of the future; logits are never kept."""
    B, T, H, W, C = q.shape
    chunks = -(-T * H * W // size)
    surplus = chunks * size - T * H * W  # keys behind the last frame, which none sees

    def chunked(a: Array) -> Array:
        padded = jnp.pad(rearrange(a, "B T H W C -> B (T H W) C"), ((0, 0), (0, surplus), (0, 0)))
        return rearrange(padded, "B (n S) C -> n B S C", n=chunks)

    starts, keys, values = jnp.arange(chunks) * size, chunked(k), chunked(v)

    @partial(jax.checkpoint, prevent_cse=False)
    def of_frame(frame: Array, q: Array) -> Array:
        known = (frame + 1) * (H * W)  # so many keys are not in the future

        @partial(jax.checkpoint, prevent_cse=False)
        def look(seen: _Seen, start: Array, k: Array, v: Array) -> _Seen:
            logits = jnp.einsum("BHWC,BSC->BHWS", q, k, preferred_element_type=jnp.float32) * C**-0.5
            logits = jnp.where(start + jnp.arange(size) < known, logits, -jnp.inf)
            peak = jax.lax.stop_gradient(jnp.maximum(seen.peak, logits.max(-1)))
            weights, fade = jnp.exp(logits - peak[..., None]), jnp.exp(seen.peak - peak)
            mixed = jnp.einsum("BHWS,BSC->BHWC", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return _Seen(peak, fade * seen.total + weights.sum(-1), fade[..., None] * seen.mixed + mixed)

        def step(seen: _Seen, chunk: tuple[Array, Array, Array]) -> tuple[_Seen, None]:
            return jax.lax.cond(chunk[0] < known, look, lambda seen, *_: seen, seen, *chunk), None

        nothing = _Seen(jnp.full((B, H, W), -jnp.inf), jnp.zeros((B, H, W)), jnp.zeros((B, H, W, C)))
        seen, _ = jax.lax.scan(step, nothing, (starts, keys, values))
        return (seen.mixed / seen.total[..., None]).astype(v.dtype)

    y = jax.lax.map(lambda frame: of_frame(*frame), (jnp.arange(T), jnp.moveaxis(q, 1, 0)))
    return jnp.moveaxis(y, 0, 1)
