"""The real compiler takes the kernels, for every generation and where models call them, and logits are never held."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from opensora_jax.forecast.topology import ENVIRONMENT

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="compiling for TPUs needs libtpu: pip install -r requirements-test.txt (x86-64 Linux)",
)


@pytest.mark.parametrize(
    ("topology", "names"),
    [
        ("v5e:2x2", ("64 bfloat16", "256 float32", "prologue 128 bfloat16")),
        ("v5p:2x2x1", ("ulysses", "tensor alone", "prologue 256 float32")),
        ("v5p:2x2x1", ("ring 256",)),
        ("v6e:2x2", ("128 bfloat16", "256 bfloat16", "256 float32", "prologue 128 bfloat16")),
    ],
)
def test_attention_compiles_for_a_tpu(topology, names):
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.tpu_programs", topology, *names],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    programs = json.loads(run.stdout.splitlines()[-1])
    assert list(programs) == list(names)
    for name, found in programs.items():
        if name.startswith("prologue"):
            assert sorted(kernel.strip("_").split("_")[-1] for kernel in found["kernels"]) == ["backward", "forward"]
            continue
        times = 2 if name.startswith("ring") else 1  # the last device's keys are met outside of the loop
        # the forward kernel is not in the backward pass: what it found was kept
        assert sorted(found["kernels"]) == ["flash_backward"] * times + ["flash_forward"] * times, name
        few = 1 if name == "ring 256" else 3  # channels twice as wide meet the same number of logits
        assert found["temporary"] < found["logits"] / few, name
