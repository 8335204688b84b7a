"""Sampled videos on disk, each with a record of what made it, so that a second run samples only what is new.

A video is finished when its record stands next to it and holds the same key: a hash of the request, the
settings and the weights. The record is removed before its video is replaced and written after it.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from opensora_jax.config.files import write_json
from opensora_jax.data.media import video, video_writer
from opensora_jax.inference.contact_sheet import evenly
from opensora_jax.inference.request import Request
from opensora_jax.weights.pretrained import LATENT_FILE
from opensora_jax.weights.stamp import file_stamps, newest_step

Frames = UInt8[np.ndarray, "T H W 3"]


def weights_identity(path: str | Path) -> str:
    """Returns a hash of the names, sizes and times of a checkpoint's files (of a run's newest step).

    Contents are not read, since hashing an 11B model takes longer than sampling a video; only the latent
    statistics beside an autoencoder are. A path that does not exist has an identity too: loading is what
    refuses it.
    """
    statistics = Path(path) / LATENT_FILE
    latent = statistics.read_text() if statistics.is_file() else None
    return _digest([str(newest_step(Path(path)).absolute()), latent, file_stamps(path)])


def request_key(request: Request, settings: Any) -> str:
    """Returns a hash of a request, its reference files and `settings` (anything that JSON can hold)."""
    references = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in request.references]
    return _digest([request.prompt, request.negative, request.index, request.seed, references, settings])


def find(folder: Path, stem: str, key: str) -> dict | None:
    """Returns the record of a finished video made with the same key, else None."""
    try:
        record = json.loads((folder / f"{stem}.json").read_text())
    except (OSError, ValueError):
        return None
    return record if record["key"] == key and (folder / record["file"]).is_file() else None


def save(folder: Path, stem: str, frames: Frames, fps: float, record: dict) -> dict:
    """Writes the video (a single frame as .png), then its record, and returns the record."""
    sidecar = folder / f"{stem}.json"
    for stale in sidecar, _note(folder, stem):
        stale.unlink(missing_ok=True)
    file = video_writer.write_video(folder / f"{stem}.mp4", frames, fps)
    record = {"file": file.name, **record}
    write_json(sidecar, record)
    return record


def leave_out(folder: Path, stem: str, reason: str, key: str) -> None:
    """Notes why there is no video, for whoever counts those that there are."""
    write_json(_note(folder, stem), {"key": key, "reason": reason})


def why_left_out(folder: Path, stem: str, key: str) -> str | None:
    """Returns what `leave_out` noted with the same key, else None."""
    try:
        note = json.loads(_note(folder, stem).read_text())
    except (OSError, ValueError):
        return None
    return note["reason"] if note["key"] == key else None


def read(path: Path, most: int | None = None) -> Frames:
    """Returns all frames of a video file, or at most so many, evenly spaced. Raises: VideoError for a damaged one."""
    info = video.probe(path)
    return video.read_frames(path, info, picks=evenly(info.num_frames, most or info.num_frames))


def _note(folder: Path, stem: str) -> Path:
    return folder / f"{stem}.left_out.json"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]
