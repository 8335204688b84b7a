"""What a run writes while it trains: TensorBoard and one JSON line per logged step, both consistent after a resume."""

import json
import os
from pathlib import Path

from tensorboardX import SummaryWriter

Scalars = dict[str, float | int]


class MetricsWriter:
    """Writes scalars to `<workdir>/metrics.jsonl` and `<workdir>/tensorboard`, from `start` on.

    Lines of steps that a restarted run repeats are dropped, so that the file reads as if nothing had happened.
    """

    def __init__(self, workdir: Path, start: int):
        workdir.mkdir(parents=True, exist_ok=True)
        self._path = workdir / "metrics.jsonl"
        kept = [line for line in read_metrics(self._path) if line["step"] <= start]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, self._path)
        self._lines = self._path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)

    def write(self, step: int, scalars: Scalars) -> None:
        """Writes the scalars of a step, numbered from 1."""
        self._lines.write(json.dumps({"step": step, **scalars}) + "\n")
        self._lines.flush()
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes both files."""
        self._lines.close()
        self._board.close()


def read_metrics(path: Path) -> list[Scalars]:
    """Returns the logged steps; a last line cut short by a crash is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
