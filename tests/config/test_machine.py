"""How many compilers a machine holds."""

import os

import pytest

from opensora_jax.config import machine


@pytest.mark.parametrize(("cores", "limit", "most"), [(64, f"{13 * 2**30}\n", 2), (64, "1000", 1), (1, "max", 1)])
def test_compilers_at_once_follow_cores_and_the_memory_of_a_container(monkeypatch, tmp_path, cores, limit, most):
    (tmp_path / "memory.max").write_text(limit)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(cores))
    monkeypatch.setattr(machine, "LIMITS", (tmp_path / "missing", tmp_path / "memory.max"))
    assert machine.compilers_at_once() == most
