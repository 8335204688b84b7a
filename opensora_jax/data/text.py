"""The sentences about frame rate and motion that the model reads at the end of a caption.

Training and sampling write them differently, on purpose as in Open-Sora 2.0: opensora/datasets/datasets.py
(training), opensora/utils/inference.py (sampling). The published weights know these exact strings.
"""

import math
import re

from opensora_jax.data.transforms import target_fps

NO_FPS_LIMIT = 999  # from here on fps_max means "any frame rate", and the caption does not name one


def training_text(text: str, *, fps: float | int, fps_max: float | int, motion_score: float | int | None = None) -> str:
    """Returns the caption with its training suffix: "A cat. 24 FPS, 3 motion score.".

    fps is the file's own rate (NaN for an image: not named); motion_score may be None or NaN (not named).
    """
    shown_fps, _ = target_fps(fps, fps_max)
    parts = []
    if shown_fps != 0 and fps_max < NO_FPS_LIMIT:
        parts.append(f"{shown_fps} FPS")
    if motion_score is not None and not math.isnan(motion_score):
        parts.append(f"{int(motion_score + 0.5)} motion score")
    return f"{text} {', '.join(parts)}." if parts else text


def sampling_text(text: str, *, fps: float | int | str, motion_score: float | int | str) -> str:
    """Returns a prompt with its sampling suffix: "A cat. 24 FPS. 4 motion score."."""
    return add_motion_score(add_fps(text, fps), motion_score)


def add_fps(text: str, fps: float | int | str) -> str:
    """Returns the stripped text, ended by a period and, unless it ends so already, by "{fps} FPS."."""
    text = text.strip()
    text = text if text.endswith(".") else text + "."
    return text if ends_with_fps(text) else f"{text} {fps} FPS."


def add_motion_score(text: str, motion_score: float | int | str) -> str:
    """Returns the text followed by "{motion_score} motion score."; 4 is the original's default."""
    return f"{text} {motion_score} motion score."


def ends_with_fps(text: str) -> bool:
    """Returns whether the text ends in a frame rate such as "24 FPS."."""
    return re.search(r"\d+ FPS\.$", text) is not None
