"""Conditions of a training batch, in which every sample has one of its own: masks and references of a fixed shape.

A sample's condition is its number in `CONDITIONS`, an array like any other, so one compiled program serves all draws.
Source: Open-Sora 2.0, `opensora/utils/train.py` (prepare_visual_condition_*, get_batch_loss).
"""

from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from opensora_jax.diffusion.conditions import CONDITIONS, frame_mask, visible_frames

NAMES = tuple(CONDITIONS)
HEAD, TAIL = "head", "tail"  # references that are the first and the last frame of a clip, encoded alone
Drawn = Int[Array, "B"]  # each sample's number in NAMES


def clip_name(latent_frames: int) -> str:
    """Returns the name of references that are the first or the last part of a clip, encoded alone."""
    return f"clip{latent_frames}"


def fitting(names: Iterable[str], latent_frames: int, causal: bool) -> tuple[str, ...]:
    """Returns the conditions under which a clip can be trained: one that shows a part leaves something to be made."""
    return tuple(name for name in names if _longest(name, causal) < latent_frames)


def references(names: Iterable[str], latent_frames: int, causal: bool) -> dict[str, int]:
    """Returns the references that these conditions need beside the latent, and the latent frames of each.

    Images are always encoded alone. So are clips of a causal autoencoder; otherwise they are parts of the latent.
    """
    if latent_frames == 1:
        return {}
    sizes = [visible_frames(name, causal) for name in fitting(names, latent_frames, causal)]
    found = {name: 1 for name, end in ((HEAD, 0), (TAIL, 1)) if any(size[end] == 1 for size in sizes)}
    clips = sorted({max(size) for size in sizes if max(size) > 1}) if causal else []
    return found | {clip_name(count): count for count in clips}


def shows(drawn: Drawn, latent_frames: int, end: str, causal: bool) -> Bool[Array, "B"]:
    """Returns which samples show this many latent frames at an end."""
    sizes = [visible_frames(name, causal)[end == TAIL] for name in NAMES]
    return jnp.asarray([size == latent_frames for size in sizes])[drawn]


def masks(drawn: Drawn, latent_frames: int, causal: bool) -> Float[Array, "B T"]:
    """Returns 1 for the latent frames that each sample is given, 0 for those to be made."""
    table = np.zeros((len(NAMES), latent_frames), np.float32)
    for name in fitting(NAMES, latent_frames, causal):
        table[NAMES.index(name)] = frame_mask(name, latent_frames, causal)
    return jnp.asarray(table)[drawn]


def condition(
    drawn: Drawn,
    latent: Float[Array, "B T H W C"],
    given: Mapping[str, Float[Array, "B _ H W C"]],
    causal: bool,
) -> Float[Array, "B T H W M"]:
    """Returns the mask and the masked reference of every sample, on the channel axis.

    `given` has what `references` names for the conditions that may have been drawn.
    """
    frames, shown = latent.shape[1], latent
    for name, reference in given.items():
        count = reference.shape[1]
        for end in (name,) if name in (HEAD, TAIL) else (HEAD, TAIL):
            place = slice(0, count) if end == HEAD else slice(frames - count, frames)
            which = shows(drawn, count, end, causal)[:, None, None, None, None]
            shown = shown.at[:, place].set(jnp.where(which, reference, shown[:, place]))
    mask = masks(drawn, frames, causal)[:, :, None, None, None]
    return jnp.concatenate([jnp.broadcast_to(mask, (*latent.shape[:4], 1)), mask * shown], axis=-1)


def learnt_frames(mask: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Returns weights that leave given images out of the loss: an end that is given, where no frame between them is.

    Shown clips stay in the loss, as in the original, and so does a clip of which nothing else would be left.
    """
    ends = mask.at[:, 1:-1].set(0) * (mask[:, 1:-1].sum(1, keepdims=True) == 0)
    weights = 1 - ends
    return jnp.where(weights.sum(1, keepdims=True) > 0, weights, 1.0)


def padded_frames(name: str, frames: int, stride: int) -> Int[np.ndarray, "T"]:
    """Returns the frames of a clip that make a shown image fill `stride` frames, one latent frame, on its own.

    What is lost for it lies at the other end. For autoencoders that are not causal.
    """
    head, tail = visible_frames(name, causal=False)
    pad = stride - 1
    if max(head, tail) != 1 or frames <= stride:
        return np.arange(frames)
    shift = -pad if head else pad
    return np.clip(np.arange(frames) + shift, 0, frames - 1 - 2 * pad * (head and tail))


def _longest(name: str, causal: bool) -> int:
    """Returns the frames that a condition shows at one end, images as none."""
    longest = max(visible_frames(name, causal))
    return longest if longest > 1 else 0
