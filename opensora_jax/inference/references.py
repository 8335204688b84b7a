"""The images and clips that a condition shows the model, at the right size and cut to the frames it needs.

An image condition takes a single frame: the first of the first file, or the last of the last. A clip
condition takes as many frames as fill its latent frames, from the start or the end of its one file.
Source: Open-Sora 2.0, `opensora/utils/inference.py` (collect_references_batch).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from opensora_jax.config.errors import UserError
from opensora_jax.data.media import video
from opensora_jax.data.media.transforms import resize_and_crop
from opensora_jax.diffusion.conditions import visible_frames
from opensora_jax.inference.request import LatentGeometry, Request

Clip = Float[np.ndarray, "T H W 3"]


def check_references(requests: Sequence[Request], cond_type: str, autoencoder: LatentGeometry) -> None:
    """Check what requests show the model, from the headers of the files.

    Raises: UserError for a reference that is missing, not looked at, unreadable or too short.
    """
    wanted: dict[tuple[Path, int, bool], None] = {}  # each file once, in order
    for request in requests:
        if cond_type == "t2v" and request.references:
            raise UserError(
                f"cond_type t2v looks at no reference: '{request.prompt}' has {request.references[0]}. "
                "Leave it out, or use a condition such as i2v_head."
            )
        if cond_type != "t2v" and not request.references:
            raise UserError(
                f"cond_type {cond_type} needs a reference: '{request.prompt}' has none. Give --ref or a ref column."
            )
        for path in request.references:
            if not path.is_file():
                raise UserError(
                    f"The reference {path} of '{request.prompt}' does not exist. Check --ref or the ref column."
                )
        wanted |= dict.fromkeys(_shown(request, cond_type, autoencoder))
    for path, count, _ in tqdm(wanted, desc="check references", unit="file", disable=not wanted):
        _probe(path, count, cond_type)


def read_references(request: Request, cond_type: str, size: tuple[int, int], autoencoder: LatentGeometry) -> list[Clip]:
    """Returns the clips of a request as pixels in [-1, 1] at `size` (height, width), head first.

    Their number and lengths follow from the condition. Raises: UserError for a file that cannot be read or is
    too short.
    """
    shown = _shown(request, cond_type, autoencoder)
    return [_read(path, count, size, cond_type, from_end=from_end) for path, count, from_end in shown]


def pixel_frames(latent_frames: int, autoencoder: LatentGeometry) -> int:
    """Returns how many pixel frames become `latent_frames` latent frames; one image is one latent frame."""
    stride = autoencoder.strides[0]
    if latent_frames == 1:
        return 1
    return 1 + (latent_frames - 1) * stride if autoencoder.is_causal else latent_frames * stride


def _shown(request: Request, cond_type: str, autoencoder: LatentGeometry) -> list[tuple[Path, int, bool]]:
    """Returns (file, frames, whether they are its last) of each clip, head first."""
    head, tail = visible_frames(cond_type, autoencoder.is_causal)
    first = [(request.references[0], pixel_frames(head, autoencoder), False)] if head else []
    last = [(request.references[-1], pixel_frames(tail, autoencoder), True)] if tail else []
    return first + last


def _probe(path: Path, count: int, cond_type: str) -> video.VideoInfo:
    try:
        info = video.probe(path)
    except video.VideoError as error:
        raise _unreadable(path, error) from error
    if info.num_frames < count:
        raise UserError(
            f"The reference {path} has {info.num_frames} frames, {cond_type} needs {count}. Give a longer one."
        )
    return info


def _read(path: Path, count: int, size: tuple[int, int], cond_type: str, *, from_end: bool) -> Clip:
    info = _probe(path, count, cond_type)
    geometry = resize_and_crop(info.height, info.width, size, image=info.num_frames == 1)
    picks = np.arange(count) + (info.num_frames - count if from_end else 0)
    try:
        frames = video.read_frames(path, info, picks=picks, size=geometry.size, crop=geometry.crop)
    except video.VideoError as error:
        raise _unreadable(path, error) from error
    return frames.astype(np.float32) / 127.5 - 1


def _unreadable(path: Path, error: video.VideoError) -> UserError:
    return UserError(f"The reference {path} cannot be read: {error}. Give an image or a video.")
