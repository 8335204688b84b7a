"""Whether a run is asked to stop: SIGTERM, which schedulers send some time before they take a machine away."""

import itertools
import signal
from types import FrameType, TracebackType
from typing import Any

import jax
from absl import logging
from jax.experimental import multihost_utils

_ASKED = itertools.count(1)  # over all runs of a process: JAX stops at a number that no process has come to


class Preemption:
    """Listens for SIGTERM while it is entered; a second signal then ends the process at once.

    Of several processes each may be told at another time: JAX lets all of them agree on a step, and those that are told
    later have stopped by then. `told` is whether the run was, also after it is left: what comes after the run should
    not begin then.
    """

    def __init__(self) -> None:
        self.told = False
        self._before: Any = None

    def __enter__(self) -> "Preemption":
        if jax.process_count() == 1:  # else JAX listens
            self._listen()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def is_due(self) -> bool:
        """Returns whether to stop after this step, the same in all processes, which ask at every step."""
        if jax.process_count() > 1 and not self.told and multihost_utils.reached_preemption_sync_point(next(_ASKED)):
            self.told = True
            self._listen()  # JAX would go on to swallow signals; the first may still come to some of the processes
        return self.told

    def _listen(self) -> None:
        self._before = signal.signal(signal.SIGTERM, self._tell)

    def _tell(self, number: int, frame: FrameType | None) -> None:
        logging.warning("asked to stop (signal %d): saving first; the next signal ends this process at once", number)
        self.told = True
        signal.signal(number, self._before)
