"""Jobs in processes of their own: kept answers, and ends that are results too."""

import json
import os
import threading
import time
from dataclasses import asdict, replace

import pytest

from opensora_jax.forecast.facts import Compiled, Facts, Memory
from opensora_jax.forecast.jobs import make_groups
from opensora_jax.forecast.topology import parse_topology
from opensora_jax.forecast.work import Failure, Workplace, locked, pending, reason_of
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
    return Workplace(tmp_path, 300, tmp_path / "lock")


def keep(place, job, facts):
    path = place.folder / "answers" / f"{job.key}.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(asdict(facts)))


def test_an_answer_is_kept_and_found(place, job):
    assert pending(place, [job]) == [job]
    keep(place, job, FACTS)
    assert place.known(job) == FACTS
    assert place.do(job) == FACTS
    assert pending(place, [job]) == []
    assert place.known(replace(job, topology="v5e:4x4")) is None


def test_a_job_that_takes_too_long_is_a_failure_and_its_process_is_gone(tmp_path, job):
    began = time.monotonic()
    found = Workplace(tmp_path, 1, tmp_path / "lock").do(job)
    assert isinstance(found, Failure)
    assert "took longer than 1 s: give more with --timeout=" in found.reason
    assert time.monotonic() - began < 30


def test_what_the_networks_cannot_take_is_told_in_the_words_of_training(place, job):
    pytest.importorskip("libtpu")
    mesh = job.sections["mesh"] | {"data": 1, "fsdp": 1, "seq": 4}
    found = place.do(replace(job, sections=job.sections | {"mesh": mesh}))
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


def test_only_one_compiles_at_a_time(tmp_path):
    path, said, order = tmp_path / "lock", [], []

    def other():
        with locked(path, said.append):
            order.append("other")

    with locked(path, said.append):
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "other"]
    assert said == ["waiting for another plan"]
    assert os.path.exists(path)
