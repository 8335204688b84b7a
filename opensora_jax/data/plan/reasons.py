"""Why rows of a table have no bucket, and why lines of bucket_config have no rows: the words of reports and errors."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from opensora_jax.data.plan.fit import LEAST_SIZE, Level, Rows


class Unassigned(NamedTuple):
    """Why `rows` rows are in no bucket, how far the best of them is, and what would help."""

    reason: str
    rows: int
    best: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.rows} {self.reason}" + (f" ({self.best})" if self.best else "")


class EmptyLine(NamedTuple):
    """A line of bucket_config that no sample reached in any aspect ratio, and why."""

    resolution: str
    num_frames: int
    reason: str
    is_off: bool = False  # its probability is 0, which is how a line is switched off

    def __str__(self) -> str:
        return f"{self.resolution}, {self.num_frames} frames has no sample ({self.reason})"


def explain(left: Rows, levels: Sequence[Level]) -> Iterator[Unassigned]:
    """Yields the reasons why these rows have no bucket; a row counts for the first reason that holds."""
    smallest = min(level.pixels for level in levels)
    image = left.frames == 1
    least = _least_frames(left, levels)
    has_image = np.any([left.covers(level.pixels) for level in levels if level.num_frames == 1], axis=0)
    reasons = [
        ("marked bad in the table", ~left.ok, "mend or replace those files"),
        (
            f"smaller than {smallest * LEAST_SIZE:.0f} pixels",
            ~left.covers(smallest),
            "use larger frames or a smaller resolution",
        ),
        ("images without a line of 1 frame", image & ~has_image, "use videos or add such a line"),
        (
            "videos without a line of more than 1 frame",
            ~image & (least == 0),
            "use images or add such a line",
        ),
    ]
    for count in np.unique(least[least > 0]).tolist():
        short = ~image & (least == count) & (left.frames < count)
        reasons.append((f"shorter than {count} frames", short, "use longer videos or lines of fewer frames"))
    reasons.append(("left out by a probability below 1", np.ones_like(image), "raise the probabilities"))
    told = np.zeros_like(image)
    for reason, holds, remedy in reasons:
        if (mine := holds & ~told).any():
            yield Unassigned(reason, int(mine.sum()), _best_of(left.take(mine), reason), remedy)
        told |= holds


def _least_frames(rows: Rows, levels: Sequence[Level]) -> Int[np.ndarray, " N"]:
    """Returns the fewest frames of a video level for frames of each row's size, 0 if there is none."""
    least = np.zeros_like(rows.frames)
    videos = [level for level in levels if level.num_frames > 1]
    for pixels in {level.pixels for level in videos}:
        frames = min(level.num_frames for level in videos if level.pixels == pixels)
        here = rows.covers(pixels)
        least[here] = np.where(least[here] > 0, np.minimum(least[here], frames), frames)
    return least


def _best_of(rows: Rows, reason: str) -> str:
    if reason.startswith("shorter"):
        longest = np.argmax(rows.frames)
        frames, interval = rows.frames[longest], rows.interval[longest]
        return f"longest: {frames}" + (f", taking 1 of {interval} to keep to fps_max" if interval > 1 else "")
    if reason.startswith("smaller"):
        largest = np.argmax(rows.area)
        return f"largest: {rows.height[largest]}x{rows.width[largest]}"
    return ""


def why_empty(level: Level, large: int, fits: int) -> EmptyLine:
    """Returns the line with the reason: `large` samples have its pixels, `fits` of them its frames too."""
    if level.keep == 0:
        return EmptyLine(level.resolution, level.num_frames, "its probability is 0", is_off=True)
    if fits:
        reason = f"{fits} would fit, but all went to other lines or were left out by a probability"
    elif large:
        wanted = "is an image" if level.num_frames == 1 else f"has {level.num_frames} frames"
        reason = f"{large} are large enough, none of them {wanted}"
    else:
        reason = f"none has {level.pixels * LEAST_SIZE:.0f} pixels"
    return EmptyLine(level.resolution, level.num_frames, reason)
