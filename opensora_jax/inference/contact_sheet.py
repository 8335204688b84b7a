"""One picture of many videos: for each a strip of evenly spaced frames with its prompt below, in columns.

Drawn with Pillow and the font that ships inside it, so that it looks the same on every machine.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from opensora_jax.config.files import replacing

WIDTH = 1800  # pixels, at most
MARGIN, GUTTER, FRAME_GAP, ROW_GAP = 24, 30, 3, 18
FONT_SIZE, LINE_HEIGHT, MAX_LINES = 17, 22, 2
FRAMES = 5  # of a strip
MAX_TILE = 256  # pixels, the longest side of a frame
PAPER, INK = (255, 255, 255), (45, 45, 52)


def contact_sheet(
    videos: Sequence[UInt8[np.ndarray, "T H W 3"]], prompts: Sequence[str], *, num_frames: int = FRAMES
) -> Image.Image:
    """Returns the picture, at most 1800 pixels wide, with up to `num_frames` frames a strip.

    Raises: ValueError if there is no video or not one prompt for each.
    """
    if not videos or len(videos) != len(prompts):
        raise ValueError(
            f"A contact sheet needs a prompt for each video: {len(videos)} videos, {len(prompts)} prompts."
        )
    columns = _columns(len(videos))
    picked = [video[evenly(len(video), num_frames)] for video in videos]
    scale = _scale(picked, (WIDTH - 2 * MARGIN - (columns - 1) * GUTTER) // columns)
    strips = [_strip(frames, scale) for frames in picked]
    width = max(strip.width for strip in strips)
    captions = [wrap(prompt, width) for prompt in prompts]
    return _arrange(strips, captions, columns, width)


def write_contact_sheet(
    path: Path, videos: Sequence[UInt8[np.ndarray, "T H W 3"]], prompts: Sequence[str], *, num_frames: int = FRAMES
) -> None:
    """Write the picture of `contact_sheet` as a PNG, complete or not at all."""
    with replacing(path) as temporary:
        contact_sheet(videos, prompts, num_frames=num_frames).save(temporary, format="PNG", optimize=True)


def wrap(text: str, width: int) -> list[str]:
    """Returns `text` in at most two lines no wider than `width` pixels, cut off with an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _font().getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    shown = lines[:MAX_LINES]
    if len(lines) > MAX_LINES:
        shown[-1] += "…"
    return [_clip(line, width) for line in shown]


def _clip(line: str, width: int) -> str:
    while len(line) > 1 and _font().getlength(line) > width:
        line = line.rstrip("…")[:-1] + "…"
    return line


def _arrange(strips: list[Image.Image], captions: list[list[str]], columns: int, width: int) -> Image.Image:
    rows = -(-len(strips) // columns)
    lines = max(map(len, captions))
    height = max(strip.height for strip in strips)
    pitch = height + 6 + lines * LINE_HEIGHT + ROW_GAP
    size = (2 * MARGIN + columns * width + (columns - 1) * GUTTER, 2 * MARGIN + rows * pitch - ROW_GAP)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (strip, caption) in enumerate(zip(strips, captions, strict=True)):
        x = MARGIN + i % columns * (width + GUTTER)
        y = MARGIN + i // columns * pitch
        sheet.paste(strip, (x, y))
        for n, line in enumerate(caption):
            draw.text((x, y + height + 6 + n * LINE_HEIGHT), line, fill=INK, font=_font())
    return sheet


def _strip(frames: UInt8[np.ndarray, "T H W 3"], scale: float) -> Image.Image:
    height, width = (max(1, int(side * scale)) for side in frames.shape[1:3])
    strip = Image.new("RGB", (len(frames) * (width + FRAME_GAP) - FRAME_GAP, height), PAPER)
    for i, frame in enumerate(frames):
        image = Image.fromarray(np.ascontiguousarray(frame))
        strip.paste(image.resize((width, height), Image.Resampling.BICUBIC), (i * (width + FRAME_GAP), 0))
    return strip


def _scale(picked: list[np.ndarray], width: int) -> float:
    """Returns one zoom for all: the widest strip fits its column, no frame exceeds the largest tile."""
    columns = min((width - FRAME_GAP * (len(v) - 1)) / (len(v) * v.shape[2]) for v in picked)
    return min(columns, MAX_TILE / max(max(v.shape[1:3]) for v in picked))


def evenly(length: int, count: int) -> np.ndarray:
    """Returns the numbers of at most `count` of so many frames, from the first to the last."""
    return np.linspace(0, length - 1, min(length, count)).round().astype(int)


def _columns(videos: int) -> int:
    return 1 if videos <= 3 else 2 if videos <= 10 else 3


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=FONT_SIZE)
