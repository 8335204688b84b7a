"""What a step has to tell, scalars and sampled videos, and the files that samples are kept in."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from jaxtyping import UInt8

from opensora_jax.data.media.video_writer import write_video

Scalars = dict[str, float | int]
Frames = UInt8[np.ndarray, "_T _H _W 3"]  # one frame is a still
Video = tuple[Frames, float | int]  # its fps
Videos = Mapping[str, Video]  # by name

NO_VIDEOS: Videos = MappingProxyType({})


def with_bucket(scalars: Scalars, bucket: str) -> Scalars:
    """Returns the scalars with the loss once more under the name of its bucket, if there is one."""
    return scalars | ({f"loss of {bucket}": scalars["loss"]} if bucket and "loss" in scalars else {})


def sample_path(workdir: Path, step: int, name: str, frames: Frames) -> Path:
    """Returns the file of a sample."""
    return workdir / "samples" / str(step) / f"{name}{'.png' if len(frames) == 1 else '.mp4'}"


def write_samples(workdir: Path, step: int, videos: Videos) -> None:
    """Writes the samples of a step to their files; those of a step that is repeated are written anew."""
    for name, (frames, fps) in videos.items():
        path = sample_path(workdir, step, name, frames)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, frames, fps)
