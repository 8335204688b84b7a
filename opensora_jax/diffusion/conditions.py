"""Which latent frames the denoiser is shown: text alone, an image at either end, or a clip to continue.

A condition is data, a pair (frames at the head, frames at the tail); one function turns it into the mask and
the masked reference that the model takes, another puts the reference back after sampling. In training
(diffusion/drawn_conditions.py) every sample of a batch has its own.
Source: Open-Sora 2.0, `opensora/utils/inference.py` and `sampling.py`.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

CONDITIONS = {
    # name:           (non-causal,  causal) autoencoder, each (head, tail) in latent frames
    "t2v": ((0, 0), (0, 0)),
    "i2v_head": ((1, 0), (1, 0)),
    "i2v_tail": ((0, 1), (0, 1)),
    "i2v_loop": ((1, 1), (1, 1)),
    "v2v_head": ((8, 0), (9, 0)),
    "v2v_tail": ((0, 8), (0, 9)),
    "v2v_head_easy": ((16, 0), (17, 0)),
    "v2v_tail_easy": ((0, 16), (0, 17)),
}


def visible_frames(name: str, causal: bool) -> tuple[int, int]:
    """Returns (head, tail): how many latent frames of a reference the model sees at either end.

    Raises: ValueError for a name that is not in the table.
    """
    if name not in CONDITIONS:
        raise ValueError(f"Unknown condition '{name}'. Allowed: {', '.join(CONDITIONS)}.")
    return CONDITIONS[name][causal]


def frame_mask(name: str, latent_frames: int, causal: bool) -> Float[np.ndarray, "T"]:
    """Returns 1 for latent frames that are given, 0 for those to be made; an image (T = 1) has none given.

    Raises: ValueError for an unknown name, or a video shorter than the frames the condition gives.
    """
    head, tail = visible_frames(name, causal)
    mask = np.zeros(latent_frames, np.float32)
    if latent_frames == 1:
        return mask
    if head + tail > latent_frames:
        raise ValueError(
            f"{name} gives {head + tail} latent frames, the video has {latent_frames}. "
            "Ask for more frames or another condition."
        )
    mask[:head] = 1
    mask[latent_frames - tail :] = 1
    return mask


def condition(
    name: str,
    references: Sequence[Sequence[Float[Array, "_ H W C"]]] | None,
    shape: tuple[int, int, int, int, int],
    causal: bool,
) -> tuple[Float[Array, "B T H W 1"], Float[Array, "B T H W C"]]:
    """Returns the mask and the masked reference for latents of `shape` (B, T, H, W, C).

    `references[i]` lists the reference latents of sample i: the head comes from the start of the first one,
    the tail from the end of the last one. t2v takes None.
    Raises: ValueError for an unknown name, a missing reference, or one that is too short.
    """
    batch, frames, height, width, _ = shape
    mask = frame_mask(name, frames, causal)
    head, tail = visible_frames(name, causal) if mask.any() else (0, 0)
    full_mask = jnp.broadcast_to(mask[:, None, None, None], (batch, frames, height, width, 1))
    if head + tail == 0:
        return full_mask, jnp.zeros(shape)
    if references is None or len(references) != batch or not all(references):
        raise ValueError(f"{name} needs a reference for each of the {batch} samples. Give one, or use t2v.")
    placed = [_place(sample, head, tail, shape[1:], name) for sample in references]
    return full_mask, jnp.stack(placed)


def paste(
    name: str,
    latents: Float[Array, "B T H W C"],
    mask: Float[Array, "B T H W 1"],
    reference: Float[Array, "B T H W C"],
) -> Float[Array, "B T H W C"]:
    """Returns the sampled latents with the given image frames put back, in every sample.

    The original does so for the first sample only, which its batch size of 1 hides. Clips (v2v) are not put
    back: their latents were encoded together with frames that the continuation does not share.
    """
    return jnp.where(mask > 0, reference, latents) if name.startswith("i2v") else latents


def _place(
    references: Sequence[Array], head: int, tail: int, shape: tuple[int, ...], name: str
) -> Float[Array, "T H W C"]:
    first, last = references[0], references[-1]
    if first.shape[0] < head or last.shape[0] < tail:
        raise ValueError(
            f"{name} needs a reference of {max(head, tail)} latent frames: got {first.shape[0]}. Give a longer clip."
        )
    middle = jnp.zeros((shape[0] - head - tail, *shape[1:]))
    return jnp.concatenate([first[:head], middle, last[last.shape[0] - tail :]])
