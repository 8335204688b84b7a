"""What tests give the commands that they start in processes of their own."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]

QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # half the time to compile
if metadata.version("jax") < "0.11":  # later ones know no other way to make loops, and end at an unknown flag
    QUICK += " --xla_cpu_use_fusion_emitters=false"  # a third less again


def cpu_devices(count: int) -> dict[str, str]:
    """Returns the variable that makes a CPU so many devices, with the flags that all tests have."""
    return {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"}


def free_port() -> int:
    """Returns a port of this machine that nothing listens to."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def run_together(code: str, each: Sequence[Sequence[object]]) -> list[tuple[int, str]]:
    """Runs code in a process for each of these arguments, all at once; returns each one's status and output."""
    environment = os.environ | cpu_devices(1) | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
    processes = [subprocess.Popen([sys.executable, "-c", code, *map(str, one)], **pipes) for one in each]
    printed = [process.communicate(timeout=120)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, printed, strict=True)]
