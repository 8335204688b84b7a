"""The scores of reconstructed clips: of each, their mean and the worst of them, as text, as CSV and as JSON."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import UInt8
from pyarrow.csv import write_csv

from opensora_jax.config.files import replacing
from opensora_jax.training.quality import WINDOW, psnr_db, ssim

Line = dict[str, Any]  # a clip's path, num_frames, height, width and what it scored
WORST = {"psnr_db": min, "ssim": min, "lpips": max}  # measure -> which of two is worse
SHOWN = 20  # clips; all are in the CSV
COLUMNS = pa.schema(
    [
        ("row", pa.int64()),
        ("path", pa.string()),
        ("text", pa.string()),
        *((name, pa.int64()) for name in ("num_frames", "height", "width")),
        *((name, pa.float64()) for name in ("fps", *WORST)),
        ("file", pa.string()),
    ]
)


def measure(clip: UInt8[np.ndarray, "T H W 3"], reconstruction: UInt8[np.ndarray, "T H W 3"]) -> dict[str, float]:
    """Returns how close a reconstruction is, as means over frames; frames smaller than its window have no SSIM."""
    a, b = clip / np.float32(255), reconstruction / np.float32(255)
    found = {"psnr_db": float(psnr_db(a, b).mean())}
    return found | ({"ssim": float(ssim(a, b).mean())} if min(clip.shape[1:3]) >= WINDOW else {})


def summary(lines: Sequence[Line]) -> dict[str, Any]:
    """Returns mean and worst of every measure over the clips that have it, as `psnr_db` and `psnr_db_worst`."""
    found: dict[str, Any] = {"clips": len(lines)}
    for name, worst in WORST.items():
        values = [line[name] for line in lines if line.get(name) is not None]
        if values:
            found |= {name: float(np.mean(values)), f"{name}_worst": worst(values)}
    return found


def totals(lines: Sequence[Line]) -> list[Line]:
    """Returns the lines below the clips: their mean and the worst of each measure, called so in `path`."""
    found = summary(lines)
    return [
        {"path": name} | {measure: found.get(measure + suffix) for measure in WORST}
        for name, suffix in (("mean", ""), ("worst", "_worst"))
    ]


def write_scores(path: Path, lines: Sequence[Line]) -> None:
    """Writes the clips' lines and, below them, the totals, whose `row` is empty. What a line lacks is empty, too."""
    rows = [{name: line.get(name) for name in COLUMNS.names} for line in (*lines, *totals(lines))]
    with replacing(path) as temporary:
        write_csv(pa.Table.from_pylist(rows, schema=COLUMNS), temporary)


def describe(found: dict[str, Any]) -> str:
    """Returns a summary in one line."""
    names = [name for name in WORST if name in found]
    return ", ".join(f"{name} {found[name]:.3f} (worst {found[f'{name}_worst']:.3f})" for name in names)


def as_text(lines: Sequence[Line]) -> str:
    """Returns a table to print: the first clips, then the totals; a measure that no clip has is left out."""
    measures = [name for name in WORST if any(line.get(name) is not None for line in lines)]
    cells = [("clip", "frames", "size", *measures)]
    cells += [(Path(line["path"]).name, *_shape(line), *_scores(line, measures)) for line in lines[:SHOWN]]
    if len(lines) > SHOWN:
        cells.append((f"... {len(lines) - SHOWN} more", *("" for _ in cells[0][1:])))
    cells += [(line["path"], "", "", *_scores(line, measures)) for line in totals(lines)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in cells
    )


def _shape(line: Line) -> tuple[str, str]:
    return str(line["num_frames"]), f"{line['height']}x{line['width']}"


def _scores(line: Line, measures: Sequence[str]) -> list[str]:
    digits = {"psnr_db": 2}
    values = ((name, line.get(name)) for name in measures)
    return ["-" if value is None else f"{value:.{digits.get(name, 4)}f}" for name, value in values]
