"""What a run writes while it trains: TensorBoard and one JSON line per logged step, both consistent after a resume.

Sampled videos are files and images in TensorBoard. Weights & Biases gets the same where a config asks for it.
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from tensorboardX import SummaryWriter
from tensorboardX.proto.summary_pb2 import Summary

from opensora_jax.config.files import replacing
from opensora_jax.data.media.video_writer import write_gif
from opensora_jax.training.logged import NO_VIDEOS, Frames, Scalars, Videos, with_bucket, write_samples
from opensora_jax.training.wandb_writer import NO_WANDB, WandbConfig, WandbWriter


class MetricsWriter:
    """Writes scalars to `<workdir>/metrics.jsonl`, samples to `<workdir>/samples`, both to `<workdir>/tensorboard`.

    It goes on after step `start`: lines of steps that a restarted run repeats are dropped, so that the file reads as if
    nothing had happened.
    """

    def __init__(self, workdir: Path, start: int):
        workdir.mkdir(parents=True, exist_ok=True)
        self._workdir, self._path = workdir, workdir / "metrics.jsonl"
        kept = [line for line in read_metrics(self._path) if line["step"] <= start]
        with replacing(self._path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._lines = self._path.open("a")
        # Without a bound: on a full disk nobody may empty the queue any more, and training would wait for room in it.
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1, max_queue=0)

    def write(self, step: int, scalars: Scalars, bucket: str = "", videos: Videos = NO_VIDEOS) -> None:
        """Writes what a step, numbered from 1, has to tell; without scalars there is no line.

        TensorBoard also has a curve of the loss for each bucket, and samples as stills or as GIFs that play.
        """
        if scalars:
            told = {"step": step} | ({"bucket": bucket} if bucket else {}) | scalars
            self._lines.write(json.dumps(told) + "\n")
            self._lines.flush()
        for name, value in with_bucket(scalars, bucket).items():
            self._board.add_scalar(name, value, step)
        write_samples(self._workdir, step, videos)
        for name, (frames, fps) in videos.items():
            self._show(f"samples/{name}", frames, fps, step)

    def _show(self, tag: str, frames: Frames, fps: float | int, step: int) -> None:
        T, H, W, _ = frames.shape
        if T == 1:
            self._board.add_image(tag, frames[0], step, dataformats="HWC")
        else:  # add_video does the same through moviepy, another ffmpeg
            gif = Summary.Image(height=H, width=W, colorspace=3, encoded_image_string=write_gif(None, frames, fps))
            self._board.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=gif)]), step)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError) if error else nullcontext():  # a full disk is told of once
            self.close()

    def close(self) -> None:
        """Flushes and closes both files."""
        self._lines.close()
        self._board.close()


class Writers:
    """Writes to all of these and closes them, in this order; to none in all processes but the first."""

    def __init__(self, *writers: MetricsWriter | WandbWriter):
        self._writers, self._open = writers, ExitStack()
        for writer in reversed(writers):
            self._open.enter_context(writer)

    def write(self, step: int, scalars: Scalars, bucket: str = "", videos: Videos = NO_VIDEOS) -> None:
        """Writes what a step, numbered from 1, has to tell."""
        for writer in self._writers:
            writer.write(step, scalars, bucket, videos)

    def __enter__(self) -> "Writers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def close(self) -> None:
        """Closes all, even if one of them fails."""
        self._open.close()


def open_metrics(
    workdir: Path,
    start: int,
    is_first: bool,
    wandb: WandbConfig = NO_WANDB,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Writers:
    """Returns what this process writes its metrics with; a run at W&B has `settings` as its config.

    Raises: UserError where W&B is wanted and missing, or refuses the run.
    """
    if not is_first:
        return Writers()
    remote = [WandbWriter(workdir, wandb, settings)] if wandb.project else []
    return Writers(MetricsWriter(workdir, start), *remote)


def read_metrics(path: Path) -> list[Scalars]:
    """Returns the logged steps; a last line cut short by a crash is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
