"""What tests give the commands that they start in processes of their own."""

import os
import socket
from importlib import metadata

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
