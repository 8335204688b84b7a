"""The loop every training command runs: batches in, steps, metrics and checkpoints out, and exact continuation."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from tqdm import tqdm

from opensora_jax.config.errors import UserError
from opensora_jax.config.files import write_json
from opensora_jax.parallel.batch import to_devices
from opensora_jax.training.checkpoint import Checkpoints
from opensora_jax.training.metrics import MetricsWriter
from opensora_jax.training.state import TrainState

Step = Callable[[TrainState, dict[str, jax.Array], jax.Array], tuple[TrainState, dict[str, jax.Array]]]
Batches = Callable[[int, int], Iterator[dict[str, np.ndarray]]]


@dataclass(frozen=True)
class LoopConfig:
    """How long to train, and how often to log and to save, in steps."""

    num_steps: int
    log_every: int
    ckpt_every: int
    keep_n_latest: int

    def __post_init__(self):
        """All counts are positive."""
        if min(self.num_steps, self.log_every, self.ckpt_every, self.keep_n_latest) < 1:
            raise ValueError(f"num_steps, log_every, ckpt_every and keep_n_latest are at least 1: got {self}.")


@dataclass(frozen=True)
class Run:
    """One training run: where it writes, its title, what its checkpoints must agree with, and its whole config."""

    workdir: Path
    title: str
    seed: int
    mesh: Mesh
    config: LoopConfig
    meta: dict[str, Any]
    settings: dict[str, Any]

    def fit(self, step: Step, init: Callable[[], TrainState], abstract: TrainState, batches: Batches) -> TrainState:
        """Returns the state after `config.num_steps` steps, continuing from the newest checkpoint in `workdir`.

        `batches(start, stop)` yields this host's part of the batches of those steps. A run that was killed and
        started again gives the same losses as one that was not: data, noise and state depend on the step alone.
        """
        checkpoints = Checkpoints(self.workdir, keep_n_latest=self.config.keep_n_latest)
        try:
            state = checkpoints.restore(abstract, self.meta) or init()
            start = self._start(int(state.step))
            writer = MetricsWriter(self.workdir, start)
            write_json(self.workdir / "config.json", self.settings)
            try:
                return self._steps(step, state, start, batches(start, self.config.num_steps), checkpoints, writer)
            finally:
                writer.close()
        finally:
            checkpoints.close()

    def _start(self, start: int) -> int:
        stop = self.config.num_steps
        if start > stop:
            raise UserError(
                f"{self.workdir} is at step {start}, past num_steps={stop}: raise num_steps or use another workdir"
            )
        if start:
            verb = "already finished" if start == stop else "continuing"
            logging.info("%s: %s at step %d of %d in %s", self.title, verb, start, stop, self.workdir)
        return start

    def _steps(
        self,
        step: Step,
        state: TrainState,
        start: int,
        batches: Iterator[dict[str, np.ndarray]],
        checkpoints: Checkpoints,
        writer: MetricsWriter,
    ) -> TrainState:
        compiled, key = jax.jit(step, donate_argnums=0), jax.random.key(self.seed)
        stop, clock, counted = self.config.num_steps, time.perf_counter(), start
        with tqdm(total=stop, initial=start, desc=self.title, unit="step") as bar:
            for number, batch in enumerate(batches, start=start + 1):
                state, metrics = compiled(state, to_devices(batch, self.mesh), key)
                if number % self.config.log_every == 0 or number == stop:
                    scalars = {name: float(value) for name, value in metrics.items()}  # waits for the device
                    now = time.perf_counter()
                    scalars["step_seconds"] = (now - clock) / (number - counted)
                    clock, counted = now, number
                    writer.write(number, scalars)
                    bar.set_postfix(loss=f"{scalars['loss']:.4f}", refresh=False)
                if number % self.config.ckpt_every == 0 or number == stop:
                    checkpoints.save(number, state, self.meta)
                bar.update()
        return state
