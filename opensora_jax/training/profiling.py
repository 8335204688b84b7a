"""Profiles of a few steps on demand: at a step that the config names, and after SIGUSR1 while a run goes on.

A trace starts between two steps, with idle devices, and ends when its last step is done. What goes wrong with it is a
warning: a run of weeks does not end for a profile.
"""

import signal
import tempfile
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import jax
from absl import logging


@dataclass(frozen=True)
class ProfileConfig:
    """Which steps to profile: `steps` of them from step `at` on (0: none), and as many after each SIGUSR1."""

    at: int
    steps: int

    def __post_init__(self):
        """A window has steps."""
        if self.at < 0 or self.steps < 1:
            raise ValueError(f"at is a step, or 0 for no profile, and steps is at least 1: got {self}.")


class Profiler:
    """Traces steps into `folder/step_<first of them>`, and listens for SIGUSR1, while it is entered.

    There is no signal on Windows, nor outside the main thread; the step of the config counts everywhere. A signal is
    for the process that gets it, the config for all of them, each of which writes files of its own.
    """

    def __init__(self, config: ProfileConfig, folder: Path):
        self._config, self._folder = config, folder
        self._asked, self._first = False, 0  # the first step of the running trace, numbered from 1; 0: none runs
        self._annotation = ExitStack()
        self._former: Any = None

    def __enter__(self) -> "Profiler":
        if hasattr(signal, "SIGUSR1") and threading.current_thread() is threading.main_thread():
            self._former = signal.signal(signal.SIGUSR1, self._ask)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._annotation.close()
        if self._first:
            self._stop()
        if self._former is not None:
            signal.signal(signal.SIGUSR1, self._former)

    def before(self, step: int) -> None:
        """Starts a trace if one is wanted of this step, numbered from 1; to be called before every step."""
        if self._is_wanted(step):
            self._start(step)
        if self._first:
            self._annotation.enter_context(jax.profiler.StepTraceAnnotation("train", step_num=step))

    def after(self, step: int, result: Any) -> None:
        """Stops the trace with the last step of a window, waiting for what it returned; to be called after every step.

        Also waits before a window. Raises what the step raised on the devices.
        """
        self._annotation.close()
        if self._is_wanted(step + 1):
            jax.block_until_ready(result)
        elif self._first and step - self._first + 1 >= self._config.steps:
            jax.block_until_ready(result)
            self._stop()

    def _is_wanted(self, step: int) -> bool:
        return not self._first and (self._asked or step == self._config.at)

    def _start(self, step: int) -> None:
        self._first = step  # first, so that a signal from here on finds a running trace
        self._asked = False
        options = jax.profiler.ProfileOptions()
        options.raise_error_on_start_failure = True
        options.session_id = f"process_{jax.process_index()}"  # files are named by host, which processes may share
        try:
            folder = self._step_folder()
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()  # JAX writes at the end, and traces no more after a failure
            jax.profiler.start_trace(folder, profiler_options=options)
        except (OSError, RuntimeError) as error:
            self._first = 0
            logging.warning("no profile of step %d: %s", step, error)

    def _stop(self) -> None:
        folder, self._first = self._step_folder(), 0
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:
            logging.warning("the profile in %s is lost: %s", folder, error)
            return
        logging.info(
            "the profile is in %s: `pip install xprof` and `xprof --logdir=%s`, or `tensorboard --logdir=%s`, or open "
            "its *.trace.json.gz at https://ui.perfetto.dev",
            *[folder] * 3,
        )

    def _step_folder(self) -> Path:
        return self._folder / f"step_{self._first}"

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._first:
            logging.info("signal %d is ignored: the profile in %s is not finished", number, self._step_folder())
        else:
            logging.info("asked for a profile (signal %d): it starts with the next step", number)
            self._asked = True
