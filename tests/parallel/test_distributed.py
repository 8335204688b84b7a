"""How processes find each other; that they train together is in tests/test_hosts.py."""

import jax
import pytest

from opensora_jax.config.errors import UserError
from opensora_jax.parallel import distributed
from opensora_jax.parallel.distributed import DistributedConfig, connect, is_one_of_many
from tests.environment import free_port, run_together

AGREED = """
import sys
from opensora_jax.config.errors import UserError
from opensora_jax.parallel.distributed import DistributedConfig, check_agreed, connect
connect(DistributedConfig(sys.argv[1], 2, int(sys.argv[2])))
check_agreed({"plan": "a", "sizes": (1, 2)})
try:
    check_agreed({"plan": sys.argv[2], "seed": 1})
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"SLURM_NTASKS": "4"}, False),  # of an allocation in which no step runs
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, True),
    ],
)
def test_a_cluster_is_told_by_its_variables(tmp_path, environment, expected):
    assert is_one_of_many(environment, tmp_path) == expected


def test_a_tpu_is_told_by_its_devices_unless_the_cpu_is_asked_for(tmp_path):
    (tmp_path / "accel0").touch()
    assert is_one_of_many({}, tmp_path)
    assert not is_one_of_many({"JAX_PLATFORMS": "cpu"}, tmp_path)


@pytest.mark.parametrize("fields", [("host:1", None, None), (None, 2, 0), ("host:1", 2, None), ("host:1", 2, 2)])
def test_half_an_address_is_refused(fields):
    with pytest.raises(ValueError, match=r"belong together|process_id is 0 to"):
        DistributedConfig(*fields)


def test_processes_that_are_not_found_are_one_line(monkeypatch):
    def initialize(*address, **options):
        raise RuntimeError("DEADLINE_EXCEEDED: nobody there\nmore")

    monkeypatch.setattr(distributed.jax.distributed, "initialize", initialize)
    with pytest.raises(UserError, match=r"did not find each other \(DEADLINE_EXCEEDED: nobody there\): start the same"):
        connect(DistributedConfig("10.0.0.1:1234", 2, 1))


@pytest.mark.parametrize(("how", "seconds"), [({}, 300), ({"apart": True}, 30 * 24 * 3600), ({"saves": True}, 300)])
def test_processes_may_work_apart_and_only_those_that_save_ask_jax_to_listen(monkeypatch, how, seconds):
    before, given = jax.config.jax_enable_preemption_service, {}
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *address, **options: given.update(options))
    try:
        connect(DistributedConfig("10.0.0.1:1234", 2, 1), **how)
        assert jax.config.jax_enable_preemption_service == how.get("saves", False)  # which swallows SIGTERM
    finally:
        jax.config.update("jax_enable_preemption_service", before)
    assert given == {"shutdown_timeout_seconds": seconds}


def test_alone_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(distributed, "is_one_of_many", lambda *surroundings: False)
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *address, **options: 1 / 0)
    connect(DistributedConfig(None, None, None))


def test_processes_that_were_started_with_other_things_all_say_so():
    address = f"localhost:{free_port()}"
    ended = run_together(AGREED, [(address, 0), (address, 1)])
    assert [status for status, _ in ended] == [0, 0], ended
    assert all("processes [1] were started with other settings or data than process 0" in text for _, text in ended)
    assert "than process 0 (plan): give every host the same" in ended[1][1]
