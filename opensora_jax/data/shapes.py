"""The demo set: H.264 clips of one moving shape, with captions, and an analytic check of what a clip shows.

A scene is (shape, colour, direction, background), 144 in all; 24 of them are held out, so that samples of
their captions show whether a model composes attributes. Rendering is a pure function of (spec, seed, size,
frames). The check uses no network and no renderer: hues, centroids and moments of the foreground.
"""

import csv
import io
import itertools
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8
from tqdm import tqdm

from opensora_jax.config.errors import UserError
from opensora_jax.config.files import replacing
from opensora_jax.data.media.video_writer import write_video

SHAPES = ("circle", "square", "triangle")
COLORS = {  # RGB; hues about 60 degrees apart, of medium brightness, so that both backgrounds set them off
    "red": (222, 32, 32),
    "yellow": (206, 190, 16),
    "green": (24, 160, 24),
    "cyan": (16, 178, 190),
    "blue": (44, 60, 232),
    "magenta": (212, 32, 196),
}
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}  # x, y; y grows downwards
BACKGROUNDS = {"dark": (36, 36, 36), "gray": (150, 150, 150)}
PHRASES = {"right": "to the right", "left": "to the left", "up": "up", "down": "down"}

RADIUS = (0.19, 0.22)  # of the width, of the circle; square and triangle have the circle's area
TRAVEL = (0.32, 0.38)  # of the width, first to last frame
MARGIN, WANDER = 0.035, 0.05  # distance kept from the border; offset of a path from the middle, both ways
HALF_EXTENT = {"circle": 1.0, "square": np.sqrt(np.pi) / 2, "triangle": np.sqrt(2 * np.pi) / 2}  # in radii
SUPERSAMPLING = 4
FOREGROUND_LEVELS = 70  # difference from the border's median, of 255, in any channel
LEAST_TRAVEL = 0.1  # of the width
HELD_OUT_CLIPS = 2  # per held-out scene
MANIFEST_VERSION = 1


@dataclass(frozen=True)
class Shape:
    """One scene of the demo set."""

    shape: str
    color: str
    direction: str
    background: str


def all_specs() -> list[Shape]:
    """Returns the 144 scenes in a fixed order."""
    return [Shape(*spec) for spec in itertools.product(SHAPES, COLORS, DIRECTIONS, BACKGROUNDS)]


def held_out_specs() -> list[Shape]:
    """Returns 24 scenes: every (colour, direction) once, each shape 8 times, each background 12 times."""
    pairs = itertools.product(enumerate(COLORS), enumerate(DIRECTIONS))
    grounds = tuple(BACKGROUNDS)
    return [Shape(SHAPES[(i + j) % 3], color, way, grounds[(i + j) % 2]) for (i, color), (j, way) in pairs]


def caption(spec: Shape) -> str:
    """Returns e.g. "a red circle moves to the right on a dark background"."""
    return f"a {spec.color} {spec.shape} moves {PHRASES[spec.direction]} on a {spec.background} background"


def parse_caption(text: str) -> Shape | None:
    """Returns the scene of a caption, or None if the text does not name each attribute exactly once."""
    words = text.lower().replace(".", " ").replace(",", " ").split()
    found = [[w for w in words if w in names] for names in (SHAPES, COLORS, DIRECTIONS, BACKGROUNDS)]
    return Shape(*(names[0] for names in found)) if all(len(names) == 1 for names in found) else None


def render(spec: Shape, seed: int, size: int, num_frames: int) -> UInt8[np.ndarray, "T H W 3"]:
    """Returns the antialiased clip; radius, travel and path differ with the seed, the shape stays in view."""
    rng = np.random.default_rng([seed, all_specs().index(spec)])
    radius, travel = rng.uniform(*RADIUS), rng.uniform(*TRAVEL)
    low = HALF_EXTENT[spec.shape] * radius + MARGIN
    travel = min(travel, 1 - 2 * low)
    middle, across = 0.5 + rng.uniform(-WANDER, WANDER, size=2)
    first = np.clip(middle - travel / 2, low, 1 - low - travel)
    along = first + travel * np.linspace(0, 1, num_frames)
    dx, dy = DIRECTIONS[spec.direction]
    along = along if dx + dy > 0 else 1 - along
    x, y = (along, np.full(num_frames, across)) if dx else (np.full(num_frames, across), along)
    cover = _coverage(spec.shape, x, y, radius, size)[..., None]
    front, back = (np.array(rgb, np.float32) for rgb in (COLORS[spec.color], BACKGROUNDS[spec.background]))
    return np.round(back + cover * (front - back)).astype(np.uint8)


def identify(video: UInt8[np.ndarray, "T H W 3"]) -> dict[str, str | None]:
    """Returns the shape, color, direction and background that a clip shows; None where it shows none.

    Background: brightness of the border's median. Foreground: pixels unlike that median. Colour: the hue
    nearest to most of the chromatic foreground. Direction: centroid of the last quarter minus the first.
    Shape: moments of the foreground.
    """
    border = np.concatenate([video[:, 0], video[:, -1], video[:, :, 0], video[:, :, -1]], axis=1)
    ground = np.median(border.reshape(-1, 3), axis=0)
    mask = np.abs(video - ground).max(-1) > FOREGROUND_LEVELS
    return {
        "shape": _shape_of(mask),
        "color": _color_of(video[mask]),
        "direction": _direction_of(mask),
        "background": min(BACKGROUNDS, key=lambda name: abs(ground.mean() - BACKGROUNDS[name][0])),
    }


def write_dataset(output: Path, num_clips: int, size: int, num_frames: int, fps: int, seed: int) -> Path:
    """Writes videos/, captions.csv, held_out/, held_out.csv, prompts.txt and, last, manifest.json.

    Returns `output`. A folder whose manifest holds the same parameters is left as it is. Raises UserError for
    other parameters.
    """
    if num_clips < 1 or size < 16 or size % 2 or num_frames < 2 or fps < 1:
        given = f"num_clips={num_clips} size={size} frames={num_frames} fps={fps}"
        raise UserError(f"The demo set needs 1 clip, an even size from 16, 2 frames, 1 fps or more: got {given}.")
    wanted = {"version": MANIFEST_VERSION, "num_clips": num_clips, "size": size, "frames": num_frames}
    wanted |= {"fps": fps, "seed": seed}
    manifest = output / "manifest.json"
    if manifest.exists():
        found = json.loads(manifest.read_text())
        if found != wanted:
            raise UserError(f"{output} holds a set made with {found}, not {wanted}: delete it or choose another.")
        return output
    train = [(f"videos/{i:05d}.mp4", spec, seed + i) for i, spec in enumerate(_train_specs(num_clips, seed))]
    held_out = [spec for spec in held_out_specs() for _ in range(HELD_OUT_CLIPS)]
    held = [(f"held_out/{i:03d}.mp4", spec, seed + num_clips + i) for i, spec in enumerate(held_out)]
    _write_clips(output, train + held, size, num_frames, fps)
    _write_text(output / "captions.csv", _caption_csv(train))
    _write_text(output / "held_out.csv", _caption_csv(held))
    _write_text(output / "prompts.txt", "".join(f"{caption(spec)}\n" for spec in held_out_specs()))
    _write_text(manifest, json.dumps(wanted))
    return output


def _inside(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> Bool[np.ndarray, "..."]:
    """Whether points, relative to the bounding box's middle, lie in the shape; the triangle points up."""
    half = HALF_EXTENT[shape] * radius
    tests: dict[str, Callable[[], np.ndarray]] = {
        "circle": lambda: x * x + y * y < half * half,
        "square": lambda: np.maximum(np.abs(x), np.abs(y)) < half,
        "triangle": lambda: (y < half) & (2 * np.abs(x) < y + half),
    }
    return tests[shape]()


def _coverage(shape: str, x: np.ndarray, y: np.ndarray, radius: float, size: int) -> Float[np.ndarray, "T H W"]:
    """The covered part of each pixel, by counting sub-pixels; positions and radius are in widths."""
    n = size * SUPERSAMPLING
    points = ((np.arange(n) + 0.5) / n).astype(np.float32)
    dx, dy = points - x.astype(np.float32)[:, None], points - y.astype(np.float32)[:, None]
    inside = _inside(shape, dx[:, None, :], dy[:, :, None], radius)
    return inside.reshape(len(x), size, SUPERSAMPLING, size, SUPERSAMPLING).mean((2, 4), dtype=np.float32)


def _centroids(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (area, x, y) of every frame that has any foreground, in pixels."""
    mask = mask[mask.any((1, 2))].astype(np.float64)
    area = mask.sum((1, 2))
    x = (mask.sum(1) * np.arange(mask.shape[2])).sum(1) / area
    y = (mask.sum(2) * np.arange(mask.shape[1])).sum(1) / area
    return area, x, y


def _direction_of(mask: np.ndarray) -> str | None:
    _, x, y = _centroids(mask)
    quarter = max(1, len(x) // 4)
    if len(x) < 2:
        return None
    dx, dy = (p[-quarter:].mean() - p[:quarter].mean() for p in (x, y))
    if max(abs(dx), abs(dy)) < LEAST_TRAVEL * mask.shape[2]:
        return None
    return max(DIRECTIONS, key=lambda way: DIRECTIONS[way][0] * dx + DIRECTIONS[way][1] * dy)


def _hue(rgb: np.ndarray) -> Float[np.ndarray, "N"]:
    """Hue in degrees, 0 to 360, from the angle in the plane across the grey axis."""
    r, g, b = np.moveaxis(rgb.astype(np.float64), -1, 0)
    return np.degrees(np.arctan2(np.sqrt(3) * (g - b), 2 * r - g - b)) % 360


def _color_of(pixels: UInt8[np.ndarray, "N 3"]) -> str | None:
    chroma = pixels.max(-1).astype(int) - pixels.min(-1) if len(pixels) else np.zeros(0)
    pixels = pixels[chroma > FOREGROUND_LEVELS]
    if not len(pixels):
        return None
    palette = _hue(np.array(list(COLORS.values())))
    distance = np.abs((_hue(pixels)[:, None] - palette + 180) % 360 - 180)
    return tuple(COLORS)[np.bincount(distance.argmin(-1)).argmax()]


def _shape_of(mask: np.ndarray) -> str | None:
    """Votes over frames by two moments: vertical skew and the fourth-order cosine, both zero for a circle.

    A triangle with its base down has skewness -0.57 in y; for a square, (E x^4 + E y^4 - 6 E x^2 y^2) over
    (E x^4 + E y^4 + 2 E x^2 y^2) is -0.43. Pixels beyond two radii from the centroid are stray and left out.
    """
    votes = []
    mask = mask[mask.any((1, 2))]
    for frame, area, cx, cy in zip(mask, *_centroids(mask), strict=True):
        y, x = np.argwhere(frame).T.astype(np.float64)
        near = (x - cx) ** 2 + (y - cy) ** 2 < 4 * area / np.pi
        x, y = x[near] - x[near].mean(), y[near] - y[near].mean()
        votes.append(_classify(x, y))
    return max(SHAPES, key=votes.count) if votes else None


def _classify(x: np.ndarray, y: np.ndarray) -> str:
    skew = (y**3).mean() / max((y**2).mean(), 1e-9) ** 1.5
    if skew < -0.28:
        return "triangle"
    fourth, cross = (x**4 + y**4).mean(), (x * x * y * y).mean()
    return "square" if (fourth - 6 * cross) / max(fourth + 2 * cross, 1e-9) < -0.21 else "circle"


def _train_specs(num_clips: int, seed: int) -> list[Shape]:
    """Every scene that is not held out, equally often, in an order that differs with the seed."""
    held_out = set(held_out_specs())
    specs = [spec for spec in all_specs() if spec not in held_out]
    rng = np.random.default_rng(seed)
    rounds = -(-num_clips // len(specs))
    return [specs[i] for _ in range(rounds) for i in rng.permutation(len(specs))][:num_clips]


def _write_clips(output: Path, clips: list[tuple[str, Shape, int]], size: int, num_frames: int, fps: int) -> None:
    for folder in {(output / name).parent for name, _, _ in clips}:
        folder.mkdir(parents=True, exist_ok=True)

    def write(clip: tuple[str, Shape, int]) -> None:
        name, spec, seed = clip
        write_video(output / name, render(spec, seed, size, num_frames), fps, crf=12)

    with ThreadPoolExecutor((os.cpu_count() or 1) + 1) as pool:
        for _ in tqdm(pool.map(write, clips), total=len(clips), desc="clips", unit="clip"):
            pass


def _caption_csv(clips: list[tuple[str, Shape, int]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("path", "text"), *((n, caption(s)) for n, s, _ in clips)])
    return text.getvalue()


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
