"""Metrics and samples at Weights & Biases, for who wants them: one run there for all restarts of a run here.

The package is an extra, imported only when a config names a project. Whatever happens to W&B while a run goes on is a
warning, since the files of `metrics` have the same numbers.
"""

import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from absl import logging

from opensora_jax.config.errors import UserError
from opensora_jax.config.files import write_json
from opensora_jax.training.logged import NO_VIDEOS, Scalars, Videos, sample_path, with_bucket

WITHOUT = "set --config.loop.wandb.project= to train without it"
FINISH_SECONDS = 300.0  # for the last uploads; W&B would wait without end for a network that is gone


@dataclass(frozen=True)
class WandbConfig:
    """The project of a run at W&B, empty for none, and its name there, empty for that of the workdir."""

    project: str
    name: str


NO_WANDB = WandbConfig(project="", name="")


def load_wandb() -> Any:
    """Returns the package. Raises: UserError with how to get it."""
    try:
        wandb = importlib.import_module("wandb")
        reason = "" if hasattr(wandb, "init") else "./wandb is a folder"  # of runs, which Python takes for a package
    except ImportError as error:
        reason = str(error)
    if reason:
        raise UserError(f"wandb cannot be imported ({reason}): pip install '.[wandb]', or {WITHOUT}")
    return wandb


class WandbWriter:
    """Writes to a run at W&B, whose id is kept in `<workdir>/wandb.json` for the next start to continue it.

    Curves are drawn over our own step, since W&B's never repeats: steps after a restart come in once more. Where W&B
    cannot be reached the run is kept in `<workdir>/wandb`, for `wandb sync`.
    Raises: UserError where W&B refuses a run: no login, or a name with odd characters.
    """

    def __init__(self, workdir: Path, config: WandbConfig, settings: Mapping[str, Any]):
        workdir.mkdir(parents=True, exist_ok=True)
        self._wandb, self._workdir = load_wandb(), workdir
        self._run = self._start(config, dict(settings))
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, scalars: Scalars, bucket: str = "", videos: Videos = NO_VIDEOS) -> None:
        """Writes what a step has to tell; samples come from their files, which `write_samples` made."""
        if self._run is None:
            return
        with self._warning():
            media = {
                f"samples/{name}": self._media(sample_path(self._workdir, step, name, frames))
                for name, (frames, _) in videos.items()
            }
            self._run.log({"step": step, **with_bucket(scalars, bucket), **media})

    def __enter__(self) -> "WandbWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self._finish(0 if error is None or (isinstance(error, SystemExit) and not error.code) else 1)

    def close(self) -> None:
        """Ends the run, when all is uploaded."""
        self._finish(0)

    def _finish(self, exit_code: int) -> None:
        if self._run is not None:
            with self._warning():
                self._run.finish(exit_code=exit_code)
        self._run = None

    def _start(self, config: WandbConfig, settings: dict[str, Any]) -> Any:
        errors = self._wandb.errors
        init = partial(
            self._wandb.init,
            project=config.project,
            name=config.name or self._workdir.resolve().name,
            id=_run_id(self._workdir / "wandb.json"),
            resume="allow",
            dir=str(self._workdir),
            config=settings,
            allow_val_change=True,  # num_steps, say, may grow from start to start
            settings=self._wandb.Settings(finish_timeout=FINISH_SECONDS),
        )
        try:
            return init()
        except errors.Error as error:
            reason = " ".join(str(error).split()).rstrip(".")
            if not isinstance(error, errors.CommError) or isinstance(error, errors.AuthenticationError):
                raise UserError(f"W&B refuses the run: {reason}; or {WITHOUT}") from error
            where = self._workdir / "wandb"
            logging.warning("W&B cannot be reached (%s): the run is kept in %s, for `wandb sync`", reason, where)
            self._wandb.teardown()  # else the id counts as in use
            return init(mode="offline")

    def _media(self, path: Path) -> Any:
        make = self._wandb.Image if path.suffix == ".png" else partial(self._wandb.Video, format="mp4")
        return make(str(path))

    @contextmanager
    def _warning(self) -> Iterator[None]:
        """Makes an error a warning, after which nothing more is written."""
        try:
            yield
        except Exception as error:  # when its service has died W&B raises ConnectionResetError, among others
            logging.warning("nothing more is written to W&B (%r); %s has all metrics", error, self._workdir)
            self._run = None


def _run_id(path: Path) -> str:
    if not path.exists():
        write_json(path, {"id": uuid4().hex})
    return json.loads(path.read_text())["id"]
