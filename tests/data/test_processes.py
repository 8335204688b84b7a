"""1, 2 and 4 real processes: the mesh holds the same global batches, from any step, with the same replacements.

The mesh has 4 devices each time, divided among processes that find each other over the loopback.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.data.read_steps import DEVICES, START, STEPS, Noise, digest, make_plan
from tests.environment import cpu_devices, free_port

ROOT = Path(__file__).parents[2]
PLAN = make_plan(DEVICES)
BAD = [int(PLAN[START + 1].sample_ids[1]), int(PLAN[START + 5].sample_ids[-1])]


def start_processes(count):
    address = f"localhost:{free_port()}"
    environment = os.environ | {
        **cpu_devices(DEVICES // count),
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    script = [sys.executable, str(Path(__file__).with_name("read_steps.py"))]
    return [
        subprocess.Popen(
            [*script, str(index), str(count), address, *map(str, BAD)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


@pytest.fixture(scope="module")
def seen():
    """What each process printed, by the number of processes."""
    running = {count: start_processes(count) for count in (1, 2, 4)}
    outputs = {count: [process.communicate() for process in group] for count, group in running.items()}
    for count, group in running.items():
        assert [process.returncode for process in group] == [0] * count, outputs[count]
    return {count: [json.loads(out.splitlines()[-1]) for out, _ in outputs[count]] for count in running}


def test_all_processes_hold_the_batches_of_the_plan(seen):
    expected = []
    for number in range(START, START + STEPS):
        bucket, ids, seeds = PLAN[number]
        samples = map(Noise(()).read, ids.tolist(), [bucket] * len(ids), seeds.tolist())
        noise = np.stack([sample["noise"] for sample in samples])
        expected.append([number, ids.tolist(), int(digest(noise, np))])
    assert PLAN.epoch(START) == 0 < PLAN.epoch(START + STEPS - 1)
    for count in (1, 2, 4):
        assert [good for good, _ in seen[count]] == [expected] * count


def test_bad_samples_have_the_same_replacements_for_every_number_of_processes(seen):
    good, replaced = seen[1][0]
    for count in (2, 4):
        assert [bad for _, bad in seen[count]] == [replaced] * count
    for (step, ids, total), (_, others, other_total) in zip(good, replaced, strict=True):
        hit = np.isin(ids, BAD)
        assert not np.isin(others, BAD).any()
        np.testing.assert_array_equal(np.array(ids)[~hit], np.array(others)[~hit])
        assert (total != other_total) == hit.any()
        assert set(others) <= set(PLAN.samples(PLAN[step].bucket).tolist())
    assert sum(np.isin(ids, BAD).sum() for _, ids, _ in good) >= 2
