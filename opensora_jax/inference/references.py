"""The images and clips that a condition shows the model, at the right size and cut to the frames it needs.

An image condition takes a single frame: the first of the first file, or the last of the last. A clip
condition takes as many frames as fill its latent frames, from the start or the end of its one file.
Source: Open-Sora 2.0, `opensora/utils/inference.py` (collect_references_batch).
"""

from pathlib import Path

import numpy as np
from jaxtyping import Float

from opensora_jax.config.errors import UserError
from opensora_jax.data import video
from opensora_jax.data.transforms import resize_and_crop
from opensora_jax.diffusion.conditions import visible_frames
from opensora_jax.inference.request import LatentGeometry, Request

Clip = Float[np.ndarray, "T H W 3"]


def read_references(request: Request, cond_type: str, size: tuple[int, int], autoencoder: LatentGeometry) -> list[Clip]:
    """Returns the clips of a request as pixels in [-1, 1] at `size` (height, width), head first.

    Raises: UserError for a file that cannot be read or is too short.
    """
    head, tail = visible_frames(cond_type, autoencoder.is_causal)
    clips = []
    if head:
        clips.append(_read(request.references[0], pixel_frames(head, autoencoder), size, cond_type, from_end=False))
    if tail:
        clips.append(_read(request.references[-1], pixel_frames(tail, autoencoder), size, cond_type, from_end=True))
    return clips


def pixel_frames(latent_frames: int, autoencoder: LatentGeometry) -> int:
    """Returns how many pixel frames become `latent_frames` latent frames; one image is one latent frame."""
    stride = autoencoder.strides[0]
    if latent_frames == 1:
        return 1
    return 1 + (latent_frames - 1) * stride if autoencoder.is_causal else latent_frames * stride


def _read(path: Path, count: int, size: tuple[int, int], cond_type: str, *, from_end: bool) -> Clip:
    try:
        info = video.probe(path)
        if info.num_frames < count:
            raise UserError(
                f"The reference {path} has {info.num_frames} frames, {cond_type} needs {count}. Give a longer one."
            )
        geometry = resize_and_crop(info.height, info.width, size, image=info.num_frames == 1)
        start = info.num_frames - count if from_end else 0
        frames = video.read_frames(
            path, info, start=start, count=count, stride=1, size=geometry.size, crop=geometry.crop
        )
    except video.VideoError as error:
        raise UserError(f"The reference {path} cannot be read: {error}. Give an image or a video.") from error
    return frames.astype(np.float32) / 127.5 - 1
