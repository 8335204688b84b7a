"""Jobs done by processes of their own, one at a time on this machine, and their answers kept.

A compiler that crashes, or takes too long, is a result too. An answer is a file named after all that it depends on; a
lock keeps two compilers from sharing the machine's memory.
"""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from opensora_jax.forecast.facts import Facts
from opensora_jax.forecast.job import Job
from opensora_jax.forecast.topology import ENVIRONMENT

LOCK = Path(tempfile.gettempdir()) / f"opensora_jax_plan_{os.getuid()}.lock"
SHOWN = 400  # characters of a reason
_EXCEPTION = re.compile(r"[\w.]*(?:Error|Exception|Interrupt)\b")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Failure:
    """A job without an answer: the compiler ended, or was ended, before it had one."""

    reason: str
    log: Path


@dataclass(frozen=True)
class Workplace:
    """Where answers are kept, and how long a job may take."""

    folder: Path
    timeout: float | int  # seconds
    lock: Path = LOCK

    @property
    def texts(self) -> Path:
        """Folder of the texts of compiled programs."""
        return self.folder / "programs"

    def known(self, job: Job) -> Facts | None:
        """Returns the answer of a job that was done before."""
        path = self._answer(job)
        return Facts.from_json(json.loads(path.read_text())) if path.is_file() else None

    def do(self, job: Job, say: Say = lambda text: None) -> Facts | Failure:
        """Returns the answer of a job, kept or by a process that is started for it; `say` is told how it goes."""
        if found := self.known(job):
            return found
        self.texts.mkdir(parents=True, exist_ok=True)
        self._answer(job).parent.mkdir(parents=True, exist_ok=True)
        with locked(self.lock, say):
            return self.known(job) or self._run(job, say)

    def _run(self, job: Job, say: Say) -> Facts | Failure:
        answer = self._answer(job)
        task, log = answer.with_suffix(".task"), answer.with_suffix(".log")
        task.write_text(job.to_json())
        command = [sys.executable, "-m", "opensora_jax.plan"]
        command += [f"--job={task}", f"--answer={answer}", f"--cache={self.folder}"]
        environment = os.environ | ENVIRONMENT
        began = time.monotonic()
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
            try:
                status = _wait(process, began + self.timeout, lambda: say(f"{time.monotonic() - began:.0f} s"))
            finally:
                if process.poll() is None:  # its time is over, or ours is
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                task.unlink(missing_ok=True)
        if status == 0 and (found := self.known(job)):
            log.unlink(missing_ok=True)
            return found
        return Failure(reason_of(status, log, self.timeout), log)

    def _answer(self, job: Job) -> Path:
        return self.folder / "answers" / f"{job.key}.json"


def _wait(process: subprocess.Popen, until: float, tick: Callable[[], None]) -> int | None:
    """Returns the status of a process, None when its time is over."""
    while time.monotonic() < until:
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            tick()
    return None


def reason_of(status: int | None, log: Path, timeout: float | int) -> str:
    """Returns why a process with this status, None for one whose time was over, left no answer."""
    if status is None:
        return f"it took longer than {timeout:.0f} s: give more with --timeout="
    if status < 0:
        ended = signal.Signals(-status).name
        return f"the compiler's process was ended by {ended}" + (
            ", perhaps for want of this machine's memory" if ended == "SIGKILL" else ""
        )
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("error: ")]
    said = said or [line for line in lines if _EXCEPTION.match(line)] or lines[-1:]
    return said[-1].removeprefix("error: ")[:SHOWN] if said else f"the compiler's process ended with {status}"


@contextmanager
def locked(path: Path, say: Say) -> Iterator[None]:
    """Holds a lock that other processes of this user respect."""
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                say("waiting for another plan")
                time.sleep(1)
        yield


def pending(place: Workplace, jobs: Sequence[Job]) -> list[Job]:
    """Returns the jobs without an answer."""
    return [job for job in jobs if place.known(job) is None]
