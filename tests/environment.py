"""What tests give the commands that they start in processes of their own."""

import os
import socket

QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # half the time to compile


def cpu_devices(count: int) -> dict[str, str]:
    """Returns the variable that makes a CPU so many devices, with the flags that all tests have."""
    return {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"}


def free_port() -> int:
    """Returns a port of this machine that nothing listens to."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
