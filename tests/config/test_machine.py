"""How many compilers a machine holds."""

import os

import pytest

from opensora_jax.config import machine


@pytest.fixture
def groups(monkeypatch, tmp_path):
    """Returns the folder of control groups of a machine of 64 cores, where the process is in /jobs/7."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(64))
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 2**30, "SC_PAGE_SIZE": 4096}[name])
    monkeypatch.setattr(machine, "GROUP", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "GROUPS", tmp_path)
    (tmp_path / "cgroup").write_text("4:memory:/jobs/7\n0::/\n")
    return tmp_path


@pytest.mark.parametrize(("limit", "most"), [(f"{13 * 2**30}\n", 2), ("1000", 1), ("max", 32)])
@pytest.mark.parametrize(
    "file",
    [
        *("memory.max", "jobs/memory.max", "jobs/7/memory.max"),
        *("memory/memory.limit_in_bytes", "memory/jobs/7/memory.limit_in_bytes"),
    ],
)
def test_compilers_at_once_follow_the_memory_of_a_container_or_a_job(groups, file, limit, most):
    (groups / file).parent.mkdir(parents=True, exist_ok=True)
    (groups / file).write_text(limit)
    assert machine.compilers_at_once() == most


@pytest.mark.parametrize(("cores", "most"), [(64, 32), (3, 1), (1, 1)])
def test_compilers_at_once_follow_the_cores(groups, monkeypatch, cores, most):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(cores))
    assert machine.compilers_at_once() == most
