"""SIGTERM in runs of several processes, which JAX listens to; of one process see test_loop.py."""

import signal

import pytest

from tests.environment import free_port, run_together

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


def test_signals_that_come_one_after_the_other_stop_all_processes_with_a_save(tmp_path):
    address = f"localhost:{free_port()}"
    ended = run_together(STOPPED, [(address, index, tmp_path) for index in range(2)])
    assert [status for status, _ in ended] == [0, 0], ended
    assert int(next((tmp_path / "checkpoints").iterdir()).name) > 1005


@pytest.mark.parametrize("saves", ["saves", ""])
def test_one_process_alone_is_ended_where_nothing_listens(saves):
    [(status, printed)] = run_together(SWALLOWED, [(f"localhost:{free_port()}", saves)])
    assert status == -signal.SIGTERM, printed
