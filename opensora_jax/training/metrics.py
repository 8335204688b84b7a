"""What a run writes while it trains: TensorBoard and one JSON line per logged step, both consistent after a resume."""

import json
from pathlib import Path

from tensorboardX import SummaryWriter

from opensora_jax.config.files import replacing

Scalars = dict[str, float | int]


class MetricsWriter:
    """Writes scalars to `<workdir>/metrics.jsonl` and `<workdir>/tensorboard`, from `start` on.

    Lines of steps that a restarted run repeats are dropped, so that the file reads as if nothing had happened.
    """

    def __init__(self, workdir: Path, start: int):
        workdir.mkdir(parents=True, exist_ok=True)
        self._path = workdir / "metrics.jsonl"
        kept = [line for line in read_metrics(self._path) if line["step"] <= start]
        with replacing(self._path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._lines = self._path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)

    def write(self, step: int, scalars: Scalars, bucket: str) -> None:
        """Writes the scalars of a step, numbered from 1; TensorBoard also has a curve of the loss for each bucket."""
        self._lines.write(json.dumps({"step": step, "bucket": bucket, **scalars}) + "\n")
        self._lines.flush()
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)
        if bucket and "loss" in scalars:
            self._board.add_scalar(f"loss of {bucket}", scalars["loss"], step)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Flushes and closes both files."""
        self._lines.close()
        self._board.close()


class NoMetrics:
    """Stands for a MetricsWriter in all processes but the first."""

    def __enter__(self) -> "NoMetrics":
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is open."""

    def write(self, step: int, scalars: Scalars, bucket: str) -> None:
        """Leaves the writing to the first process."""


def open_metrics(workdir: Path, start: int, is_first: bool) -> MetricsWriter | NoMetrics:
    """Returns what this process writes its metrics with."""
    return MetricsWriter(workdir, start) if is_first else NoMetrics()


def read_metrics(path: Path) -> list[Scalars]:
    """Returns the logged steps; a last line cut short by a crash is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
