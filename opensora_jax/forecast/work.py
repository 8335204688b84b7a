"""Jobs done by processes of their own, as many at a time as this machine holds, and their answers kept.

A compiler that crashes, or takes too long, is a result too. An answer is a file named after all that it depends on.
Locks keep plans from filling the machine's memory together, and from doing the same job twice.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from opensora_jax.config.files import is_locked
from opensora_jax.forecast.facts import UNREADABLE, Facts
from opensora_jax.forecast.job import Job
from opensora_jax.forecast.topology import ENVIRONMENT

LOCKS = Path(tempfile.gettempdir()) / f"opensora_jax_plan_{os.getuid()}"
COMMAND = (sys.executable, "-m", "opensora_jax.plan")
TICK = 0.5  # seconds between looks at what runs
SHOWN = 400  # characters of a reason
_EXCEPTION = re.compile(r"[\w.]*(?:Error|Exception|Interrupt)\b")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Failure:
    """A job without an answer: the compiler ended, or was ended, before it had one."""

    reason: str
    log: Path


@dataclass
class Running:
    """A compiler at work on a job, and what is held for it: a place on this machine, the job, its task."""

    job: Job
    process: subprocess.Popen
    log: Path
    held: ExitStack
    began: float

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.began

    def end(self) -> None:
        """Ends it where it still runs, and frees what is held."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.held.close()


@dataclass(frozen=True)
class Workplace:
    """Where answers are kept, how long a job may take, and how many compilers all plans on this machine may start."""

    folder: Path
    timeout: float | int  # seconds
    at_once: int
    locks: Path = LOCKS

    @property
    def texts(self) -> Path:
        """Folder of the texts of compiled programs."""
        return self.folder / "programs"

    def known(self, job: Job) -> Facts | None:
        """Returns the answer of a job that was done before: none where it, or a text of it, is damaged or gone."""
        try:
            facts = Facts.from_json(json.loads(self._file(job, ".json").read_text()))
            for program in facts.programs:
                program.read(self.texts)
        except UNREADABLE:
            return None
        return facts

    def answers(self, jobs: Sequence[Job], say: Say = lambda text: None) -> Iterator[tuple[Job, Facts | Failure]]:
        """Yields every job with its answer, as they come: kept, or by a process started for it.

        `say` is told what runs. No process outlives the iteration.
        """
        for folder in (self.texts, self.folder / "answers"):
            folder.mkdir(parents=True, exist_ok=True)
        waiting, running = list(jobs), list[Running]()
        try:
            while waiting or running:
                for job in [*waiting]:
                    if found := self.known(job):  # another plan may have come to it
                        waiting.remove(job)
                        yield job, found
                    elif started := self._started(job):
                        waiting.remove(job)
                        running.append(started)
                if running:
                    say(", ".join(f"{one.job.title}: {one.seconds:.0f} s" for one in running))
                elif waiting:
                    say("waiting for another plan")
                time.sleep(TICK if running or waiting else 0)
                for one in [one for one in running if one.process.poll() is not None or one.seconds > self.timeout]:
                    running.remove(one)
                    yield one.job, self._answer(one)
        finally:
            for one in running:
                one.end()

    def _started(self, job: Job) -> Running | None:
        """Returns the process that does a job, None while there is no place for it or another plan is at it."""
        answer, task, log, own = (self._file(job, suffix) for suffix in (".json", ".task", ".log", ".lock"))
        places = (self.locks.with_name(f"{self.locks.name}.{number}.lock") for number in range(self.at_once))
        with ExitStack() as held:
            if not any(is_locked(place, held) for place in places) or not is_locked(own, held):
                return None
            held.callback(own.unlink, missing_ok=True)
            if self.known(job):  # another plan has just done it
                return None
            held.callback(task.unlink, missing_ok=True)
            task.write_text(job.to_json())
            command = [*COMMAND, f"--job={task}", f"--answer={answer}", f"--cache={self.folder}"]
            with log.open("w") as output:
                process = subprocess.Popen(
                    command, stdout=output, stderr=output, env=os.environ | ENVIRONMENT, start_new_session=True
                )
            return Running(job, process, log, held.pop_all(), time.monotonic())

    def _answer(self, one: Running) -> Facts | Failure:
        status = one.process.poll()
        one.end()
        if found := self.known(one.job):  # however it ended afterwards
            one.log.unlink(missing_ok=True)
            return found
        return Failure(reason_of(status, one.log, self.timeout), one.log)

    def _file(self, job: Job, suffix: str) -> Path:
        return self.folder / "answers" / f"{job.key}{suffix}"


def end_with_parent() -> None:
    """Ends this process, whatever it is at, as soon as the one that started it has ended: killed, it ends no other."""

    def watch(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(TICK)
        os._exit(1)

    threading.Thread(target=watch, args=(os.getppid(),), daemon=True).start()


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


def pending(place: Workplace, jobs: Sequence[Job]) -> list[Job]:
    """Returns the jobs without an answer."""
    return [job for job in jobs if place.known(job) is None]
