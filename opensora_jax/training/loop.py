"""The loop every training command runs: batches in, steps, metrics and checkpoints out, and exact continuation."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from tqdm import tqdm

from opensora_jax.config.errors import UserError
from opensora_jax.config.files import write_json
from opensora_jax.parallel.batch import batch_size, prefetch
from opensora_jax.parallel.distributed import check_agreed
from opensora_jax.training.checkpoint import Checkpoints
from opensora_jax.training.metrics import open_metrics
from opensora_jax.training.periodic import Periodic, look_at
from opensora_jax.training.preemption import Preemption
from opensora_jax.training.profiling import ProfileConfig, Profiler
from opensora_jax.training.programs import AbstractBatch, Assembled, Batch, Programs
from opensora_jax.training.state import TrainState
from opensora_jax.training.throughput import Throughput, Work
from opensora_jax.training.wandb_writer import WandbConfig
from opensora_jax.weights.workdir import flatten

Batches = Callable[[int, int], Iterator[dict[str, np.ndarray]]]

CONFIG_FILE = "config.json"
SHOWN = 5  # changed fields in a message
REPLACED = "replaced_samples"  # samples so far that stand in for clips that cannot be read, in all batches and hosts


def samples_of(batch: Batch) -> Work:
    """Returns the samples of a batch."""
    return Work(samples=batch_size(batch))


@dataclass(frozen=True)
class LoopConfig:
    """How long to train, how often to log and to save, in steps, and where metrics go besides the workdir.

    Of the checkpoints the `keep_n_latest` newest stay, and those of every `keep_every`-th step (0: none). A run ends
    when it had to skip more than `max_skipped` updates, whose loss or gradient was not finite. When the disk is full a
    run stops with its last checkpoint, or goes on without this one.
    """

    num_steps: int
    log_every: int
    ckpt_every: int
    keep_n_latest: int
    keep_every: int
    max_skipped: int
    on_full_disk: Literal["stop", "go_on"]
    profile: ProfileConfig
    wandb: WandbConfig

    def __post_init__(self):
        """All counts are positive."""
        if min(self.num_steps, self.log_every, self.ckpt_every, self.keep_n_latest) < 1:
            raise ValueError(f"num_steps, log_every, ckpt_every and keep_n_latest are at least 1: got {self}.")
        if min(self.keep_every, self.max_skipped) < 0:
            raise ValueError(f"keep_every and max_skipped are at least 0: got {self}.")


@dataclass(frozen=True)
class Run:
    """One training run: where it writes, its title, what its checkpoints must agree with, and its whole config.

    Without `save_frozen` checkpoints hold only what learns: what does not is made anew at every start.
    """

    workdir: Path
    title: str
    seed: int
    mesh: Mesh
    config: LoopConfig
    meta: dict[str, Any]
    settings: dict[str, Any]
    save_frozen: bool = True
    preemption: Preemption = field(default_factory=Preemption)

    def fit(
        self,
        assembled: Assembled,
        batches: Batches,
        examples: Mapping[str, AbstractBatch],
        *,
        encode: Callable[[Batch], Batch] = lambda batch: batch,
        work: Callable[[Batch], Work] = samples_of,
        periodic: Sequence[Periodic] = (),
    ) -> TrainState:
        """Returns the state after `config.num_steps` steps, continuing from the newest checkpoint in `workdir`.

        `batches(start, stop)` yields this host's part of the batches of those steps, which `encode` turns into what the
        step reads, on the devices. `examples` has the shapes of all these, for which the step is compiled first; `work`
        says how much a step does, and `periodic` is what else looks at the state now and then. A run that was killed
        and started again gives the same losses as one that was not: data, noise and state depend on the step alone. On
        SIGTERM the state is saved and the process exits with status 0; during the last step it is only noted, in
        `preemption.told`.
        Raises: UserError when processes have other settings or another plan than the first, when a step does not fit
        into memory, when too many updates were skipped, and when the disk refuses a checkpoint.
        """
        check_agreed(
            flatten(self.meta | {"seed": self.seed, "mesh": dict(self.mesh.shape), "loop": asdict(self.config)})
        )
        with jax.set_mesh(self.mesh):
            programs = Programs(counting(assembled), self.mesh)
            goes_on = self.config.on_full_disk == "go_on"
            kept = self.config.keep_n_latest, self.config.keep_every
            checkpoints = Checkpoints(self.workdir, *kept, goes_on=goes_on)
            try:
                self._start(checkpoints.latest_step or 0)
                state, saved = self._restore(checkpoints, assembled.abstract) or (None, {REPLACED: 0})
                if checkpoints.latest_step != self.config.num_steps:
                    fits = _comparable(saved.get("config") or {}) == _comparable(self.settings)
                    fits &= saved.get("devices") == programs.devices
                    programs.prepare(examples, known_to_fit=fits)
                if state is None:
                    state = assembled.init()
                elif not self.save_frozen:
                    state = state._replace(frozen=assembled.init().frozen)
                feed = _Feed(batches, self.mesh, encode)
                with self.preemption:  # until the last step is saved
                    state = self._fit(programs, state, saved[REPLACED], feed, checkpoints, work, periodic)
                    checkpoints.close()
                return state
            finally:
                programs.close()
                checkpoints.close()

    def _restore(self, checkpoints: Checkpoints, abstract: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Returns the newest state. Raises: UserError for that of another run, with the fields that are others now."""
        try:
            return checkpoints.restore(self._kept(abstract), self.meta)
        except UserError as error:
            path = self.workdir / CONFIG_FILE
            before = _comparable(json.loads(path.read_text())) if path.is_file() else {}
            now = _comparable(self.settings)
            names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
            if not before or not names:
                raise
            listed = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
            raise UserError(f"{error}; since {path} was written these fields have changed: {listed}") from error

    def _start(self, start: int) -> None:
        stop = self.config.num_steps
        if start > stop:
            raise UserError(
                f"{self.workdir} is at step {start}, past num_steps={stop}: raise num_steps or use another workdir"
            )
        if start:
            verb = "already finished" if start == stop else "continuing"
            logging.info("%s: %s at step %d of %d in %s", self.title, verb, start, stop, self.workdir)

    def _fit(
        self,
        programs: Programs,
        state: TrainState,
        replaced: int,
        feed: "_Feed",
        checkpoints: Checkpoints,
        work: Callable[[Batch], Work],
        periodic: Sequence[Periodic],
    ) -> TrainState:
        start, stop, config = int(state.step), self.config.num_steps, self.config
        key, skipped = programs.key(self.seed), int(state.skipped)
        total, is_first = cast(Any, np.int32(replaced)), jax.process_index() == 0
        if is_first:
            write_json(self.workdir / CONFIG_FILE, self.settings)
        speed = Throughput(self.mesh.size, self.mesh.devices.flat[0].device_kind)
        with (
            open_metrics(self.workdir, start, is_first, wandb=config.wandb, settings=self.settings) as writer,
            Profiler(config.profile, self.workdir / "profile") as profiler,
            tqdm(total=stop, initial=start, desc=self.title, unit="step", disable=not is_first) as bar,
        ):
            for number, batch in enumerate(feed.batches(start, stop), start=start + 1):
                profiler.before(number)
                state, metrics = programs(state, batch, key)
                profiler.after(number, metrics)
                speed.add(work(batch), feed.waited())
                total = metrics[REPLACED] = total + metrics[REPLACED]
                stopping = self.preemption.is_due()
                due = [] if stopping else [one for one in periodic if one.is_due(number, stop)]
                if number % config.log_every == 0 or number == stop or stopping or due:
                    scalars = {name: float(value) for name, value in metrics.items()}  # waits for the device
                    scalars |= speed.lap()
                    with checkpoints.refusals():  # metrics lie on the same disk
                        writer.write(number, scalars, programs.bucket(batch))
                    bar.set_postfix(_shown(scalars), refresh=False)
                    self._check_skipped(int(state.skipped) - skipped, number)
                if number % config.ckpt_every == 0 or number == stop or stopping:
                    about = {REPLACED: int(total), "config": self.settings, "devices": programs.devices}
                    last = number == stop or stopping
                    checkpoints.save(number, self._kept(state), self.meta | about, last=last)
                if due:  # the step is being saved meanwhile, and stays whatever becomes of the look
                    seen = look_at(state, due)
                    with checkpoints.refusals():
                        writer.write(number, seen.scalars, videos=seen.videos)
                    speed.start()  # looking is no training
                bar.update()
                if stopping and number < stop:
                    checkpoints.close()
                    logging.warning("%s: saved step %d; the same command continues there", self.title, number)
                    raise SystemExit(0)
        return state

    def _kept(self, state: TrainState) -> TrainState:
        return state if self.save_frozen else state._replace(frozen=None)

    def _check_skipped(self, skipped: int, number: int) -> None:
        if skipped > self.config.max_skipped:
            raise UserError(
                f"{skipped} updates until step {number} had a loss or gradient that is not finite, more than "
                f"loop.max_skipped = {self.config.max_skipped}: lower optim.lr, or look at the data of these steps; "
                f"{self.workdir} keeps the last good state"
            )


class _Feed:
    """Encoded batches on the devices, with the time that was spent waiting for them."""

    def __init__(self, batches: Batches, mesh: Mesh, encode: Callable[[Batch], Batch]):
        self._batches, self._mesh, self._encode, self._seconds = batches, mesh, encode, 0.0

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yields the batches of these steps."""
        placed = prefetch(self._batches(start, stop), self._mesh)
        while True:
            before = time.perf_counter()
            batch = next(placed, None)
            self._seconds += time.perf_counter() - before
            if batch is None:
                return
            yield self._encode(batch)

    def waited(self) -> float:
        """Returns the seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def _comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a config as JSON has them, but for what each process has for itself."""
    found = json.loads(
        json.dumps({name: value for name, value in settings.items() if name != "distributed"}, default=str)
    )
    return flatten(found)


def counting(assembled: Assembled) -> Assembled:
    """Returns a step whose metrics have the number of samples that stand in for clips that cannot be read."""

    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        state, metrics = assembled.step(state, batch, key)
        return state, metrics | {REPLACED: batch["replaced"].sum()}

    return replace(assembled, step=step)


def _shown(scalars: dict[str, float]) -> dict[str, str]:
    """Returns what the progress bar says: the loss, and bad clips once there are any."""
    bad = {REPLACED: f"{scalars[REPLACED]:.0f}"} if scalars[REPLACED] else {}
    return {"loss": f"{scalars['loss']:.4f}"} | bad
