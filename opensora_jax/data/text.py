"""The sentences about frame rate and motion that the model reads at the end of a caption.

Training and sampling write them differently, on purpose as in Open-Sora 2.0: opensora/datasets/datasets.py
(training), opensora/utils/inference.py (sampling). The published weights know these exact strings.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int

from opensora_jax.config.errors import UserError
from opensora_jax.data.media.transforms import target_fps

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


def training_texts(table: pa.Table, *, fps_max: float | int, fps_suffix: bool, motion_score: str) -> pa.ChunkedArray:
    """Returns the caption of every row with its training suffix, as large strings.

    The frame rate is named if `fps_suffix`, the motion score if `motion_score` is the name of a column ("": none).
    Raises: UserError when there is no such column, or it holds no numbers.
    """
    texts = pc.cast(table["text"], pa.large_string())
    fps = np.asarray(table["fps"], np.float64) if fps_suffix else np.full(len(table), np.nan)
    score = _scores(table, motion_score) if motion_score else np.full(len(table), np.nan)
    _, fps_number = np.unique(fps, return_inverse=True)
    _, score_number = np.unique(np.trunc(score + 0.5), return_inverse=True)  # equal ones give equal words
    pairs = fps_number.astype(np.int64) * (score_number.max(initial=0) + 1) + score_number
    _, first, pair = np.unique(pairs, return_index=True, return_inverse=True)
    suffixes = [
        training_text("", fps=fps[row].item(), fps_max=fps_max, motion_score=score[row].item()) for row in first
    ]
    endings = pa.array(suffixes, pa.large_string()).take(pa.array(pair))
    return pc.binary_join_element_wise(texts, endings, pa.scalar("", pa.large_string()))


class Texts(NamedTuple):
    """Each text once, the empty one first, the others in order; and which of them belongs to every row, or -1."""

    distinct: pa.LargeStringArray
    of_row: Int[np.ndarray, " N"]

    @classmethod
    def of(cls, texts: pa.ChunkedArray, rows: Sequence[int] | Int[np.ndarray, " M"]) -> "Texts":
        """Returns the texts of some rows, given those of all."""
        numbers = np.asarray(rows, np.int64)
        wanted = texts.take(pa.array(numbers))
        found = pc.unique(wanted)
        found = found.filter(pc.not_equal(found, ""))
        found = found.take(pc.sort_indices(found))
        distinct = pa.concat_arrays([pa.array([""], pa.large_string()), found])
        of_row = np.full(len(texts), -1, np.int64)
        of_row[numbers] = pc.index_in(wanted, distinct).to_numpy()
        return cls(distinct, of_row)


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


def _scores(table: pa.Table, name: str) -> np.ndarray:
    if name not in table.column_names:
        raise UserError(
            f"encode.motion_score names the column {name!r}, which the table lacks: it has "
            f"{', '.join(table.column_names)}; use one of these, or '' for none"
        )
    try:
        scores = pc.cast(table[name], pa.float64()).to_numpy()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(
            f"the column {name!r} holds no numbers ({error}); name another in encode.motion_score"
        ) from None
    return np.where(np.isfinite(scores), scores, np.nan)


def ends_with_fps(text: str) -> bool:
    """Returns whether the text ends in a frame rate such as "24 FPS."."""
    return re.search(r"\d+ FPS\.$", text) is not None
