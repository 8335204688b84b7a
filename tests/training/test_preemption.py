"""SIGTERM in runs of several processes, which JAX listens to; of one process see test_loop.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.environment import cpu_devices, free_port

ROOT = Path(__file__).parents[2]
STOPPED = """
import os, signal, sys, time
from pathlib import Path
import numpy as np
from opensora_jax.parallel.distributed import DistributedConfig, connect
from opensora_jax.training.checkpoint import Checkpoints
from opensora_jax.training.preemption import Preemption

index = int(sys.argv[2])
connect(DistributedConfig(sys.argv[1], 2, index), saves=True)
checkpoints = Checkpoints(Path(sys.argv[3]), 1)
state = {"weights": np.zeros(3)}
with Preemption() as preemption:
    for step in range(1001, 1050):  # a run that continues
        time.sleep(0.1)
        if preemption.is_due():
            break
        if step == 1005:
            checkpoints.save(step, state, {})
            if index == 0:
                os.kill(os.getpid(), signal.SIGTERM)
    else:
        sys.exit("nobody was told")
    if index == 1:
        os.kill(os.getpid(), signal.SIGTERM)  # which comes late
    checkpoints.save(step, state, {}, last=True)
    checkpoints.close()
"""
SWALLOWED = """
import os, signal, sys
from opensora_jax.parallel.distributed import DistributedConfig, connect
connect(DistributedConfig(sys.argv[1], 1, 0), saves=sys.argv[2] == "saves")
os.kill(os.getpid(), signal.SIGTERM)
"""


def start(code: str, *arguments: object) -> subprocess.Popen:
    environment = os.environ | cpu_devices(1) | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_signals_that_come_one_after_the_other_stop_all_processes_with_a_save(tmp_path):
    address = f"localhost:{free_port()}"
    processes = [start(STOPPED, address, index, tmp_path) for index in range(2)]
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert int(next((tmp_path / "checkpoints").iterdir()).name) > 1005


@pytest.mark.parametrize("saves", ["saves", ""])
def test_one_process_alone_is_ended_where_nothing_listens(saves):
    process = start(SWALLOWED, f"localhost:{free_port()}", saves)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == -15, printed
