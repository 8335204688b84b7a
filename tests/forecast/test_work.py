"""Jobs in processes of their own: kept answers, and ends that are results too."""

import gzip
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, replace

import pytest

from opensora_jax.config.files import is_locked
from opensora_jax.forecast import work
from opensora_jax.forecast.facts import Compiled, Facts, Memory
from opensora_jax.forecast.jobs import make_groups
from opensora_jax.forecast.topology import parse_topology
from opensora_jax.forecast.work import Failure, Workplace, pending, reason_of
from tests.forecast import small

FACTS = Facts(
    programs=[Compiled("train", 1, "abc", Memory(1, 2, 3, 4, 5), 6.0)],
    refusal=None,
    state={"parameters": 7},
    peak_bytes=8,
    host_bytes=9,
    flops=1e12,
    executed_flops=2e12,
    kernels=[["flash", [[2, 3]], 4.0]],
    samples=10,
    tokens=11,
    mesh={"data": 2, "fsdp": 2, "seq": 1, "tensor": 1},
    device_kind="TPU v5 lite",
    places=[[0, 0, 0]],
)


@pytest.fixture
def job():
    return make_groups(small.training(), parse_topology("v5e:2x2"), [], {})[0].wanted[0].job


@pytest.fixture
def place(tmp_path):
    return Workplace(tmp_path, 300, 2, tmp_path / "lock")


def answer(place, job, said=None):
    """Returns the answer of the only job."""
    ((asked, found),) = place.answers([job], said or (lambda text: None))
    assert asked is job
    return found


def keep(place, job, facts):
    """Writes an answer, and the texts of its programs, as a compiler does; returns the files."""
    path = place.folder / "answers" / f"{job.key}.json"
    for folder in (path.parent, place.texts):
        folder.mkdir(parents=True, exist_ok=True)
    texts = [place.texts / f"{program.text}.hlo.gz" for program in facts.programs]
    for text in texts:
        text.write_bytes(gzip.compress(b"ENTRY"))
    path.write_text(json.dumps(asdict(facts)))
    return [path, *texts]


def test_an_answer_is_kept_and_found(place, job):
    assert pending(place, [job]) == [job]
    keep(place, job, FACTS)
    assert place.known(job) == FACTS
    assert answer(place, job) == FACTS
    assert pending(place, [job]) == []
    assert place.known(replace(job, topology="v5e:4x4")) is None


@pytest.mark.parametrize("number", [0, 1], ids=["the answer", "a text"])
@pytest.mark.parametrize("content", [None, b"", b"\x1f\x8b", b"[]", b"{}"])
def test_what_a_crash_left_damaged_is_done_again(sleeper, place, job, number, content):
    damaged = keep(place, job, FACTS)[number]
    damaged.unlink() if content is None else damaged.write_bytes(content)
    assert pending(place, [job]) == [job]
    (place.folder / "answers" / "go").touch()
    assert answer(place, job).reason == "the compiler's process ended with 3"


def test_an_answer_counts_however_its_process_ends(sleeper, place, job):
    def write(text):
        keep(place, job, FACTS)
        (place.folder / "answers" / "go").touch()

    assert answer(place, job, write) == FACTS


def test_a_job_that_takes_too_long_is_a_failure_and_its_process_is_gone(tmp_path, job):
    began = time.monotonic()
    found = answer(Workplace(tmp_path, 1, 1, tmp_path / "lock"), job)
    assert isinstance(found, Failure)
    assert "took longer than 1 s: give more with --timeout=" in found.reason
    assert time.monotonic() - began < 30


def test_what_the_networks_cannot_take_is_told_in_the_words_of_training(place, job):
    pytest.importorskip("libtpu")
    mesh = job.sections["mesh"] | {"data": 1, "fsdp": 1, "seq": 4}
    found = answer(place, replace(job, sections=job.sections | {"mesh": mesh}))
    assert isinstance(found, Failure)
    assert found.reason.startswith("2 attention heads do not divide by mesh.seq x mesh.tensor = 4 x 1")
    assert found.log.is_file()
    assert list(place.folder.rglob("*.task")) == []


def test_an_end_without_an_answer_says_what_it_was(tmp_path):
    log = tmp_path / "log"
    log.write_text("I 12:00 something\nTraceback\nKeyError: 'x'\n\nFor simplicity, frames were removed.\n")
    assert reason_of(1, log, 5) == "KeyError: 'x'"
    log.write_text("noise\nerror: no room on the disk\nmore noise\n")
    assert reason_of(1, log, 5) == "no room on the disk"
    assert reason_of(-9, log, 5) == (
        "the compiler's process was ended by SIGKILL, perhaps for want of this machine's memory"
    )
    assert reason_of(-11, log, 5) == "the compiler's process was ended by SIGSEGV"
    log.write_text("")
    assert reason_of(3, log, 5) == "the compiler's process ended with 3"


SLEEPER = """
import os, pathlib, sys, time
task = pathlib.Path(sys.argv[1].removeprefix("--job="))
task.with_suffix(".runs").write_text(str(os.getpid()))
while not (task.parent / "go").exists():
    time.sleep(0.02)
task.with_suffix(".runs").unlink()
sys.exit(3)
"""


@pytest.fixture
def sleeper(monkeypatch, tmp_path):
    """Puts in place of the compiler a program that leaves its number in a file and runs until there is a file `go`."""
    script = tmp_path / "sleeper.py"
    script.write_text(SLEEPER)
    monkeypatch.setattr(work, "COMMAND", (sys.executable, str(script)))
    monkeypatch.setattr(work, "TICK", 0.02)


def some(job, count):
    return [replace(job, title=f"job {number}", options={"number": number}) for number in range(count)]


def running(place):
    """Returns the numbers of the processes at work."""
    texts = (path.read_text() for path in (place.folder / "answers").glob("*.runs"))
    return [int(text) for text in texts if text]


def test_as_many_run_as_the_machine_holds(sleeper, place, job):
    said = []

    def watch(text):
        said.append(text)
        if len(running(place)) == 2:
            (place.folder / "answers" / "go").touch()

    found = {asked.title: result.reason for asked, result in place.answers(some(job, 3), watch)}
    assert found == dict.fromkeys(["job 0", "job 1", "job 2"], "the compiler's process ended with 3")
    assert "job 0: 0 s, job 1: 0 s" in said
    assert not any(text.count("job") > 2 for text in said)
    assert {path.suffix for path in (place.folder / "answers").iterdir()} == {".log", ""}


def test_no_process_outlives_its_plan(sleeper, place, job):
    seen = []

    def stop(text):
        seen[:] = running(place)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(place.answers(some(job, 2), stop))
    for number in seen:
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)
    assert len(seen) == 2


WATCHED = """
import sys, time
from opensora_jax.forecast.work import end_with_parent
end_with_parent()
print("watches", flush=True)
time.sleep(20)
print("alone", flush=True)
"""
PARENT = """
import subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1]], start_new_session=True)
"""


def test_a_compiler_ends_with_a_plan_that_is_killed():
    line = [sys.executable, "-c", PARENT, WATCHED]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "watches\n"
        parent.kill()
        assert parent.stdout.read() == ""  # which the child holds open until it ends


@pytest.mark.parametrize("kind", ["the places of a machine", "a job"])
def test_plans_wait_for_each_other(sleeper, tmp_path, place, job, kind):
    answers = place.folder / "answers"
    answers.mkdir()
    if kind == "a job":
        paths = [answers / f"{job.key}.lock"]
    else:
        paths = [tmp_path / f"lock.{number}.lock" for number in range(2)]

    def other_plan_is_ready(text):
        assert text == "waiting for another plan"
        keep(place, job, FACTS)

    with ExitStack() as held:
        assert all(is_locked(path, held) for path in paths)
        assert answer(place, job, other_plan_is_ready) == FACTS
