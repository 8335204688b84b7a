"""Several processes as one: each host of a pod or a cluster runs the same command, and here they find each other.

It has to happen before anything asks JAX for devices.
"""

import json
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from opensora_jax.config.errors import UserError

# environment variables with the number of processes, as a number or as a list of names
COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES")
DAYS_APART, MINUTES_APART = 30 * 24 * 3600, 300  # seconds from the end of the first process to that of the last
TPU_DEVICES = ("accel0", "vfio/0")  # below /dev on the machine of a TPU


@dataclass(frozen=True)
class DistributedConfig:
    """A config's `distributed` section: the address of process 0 and this one's number, or nothing.

    Without an address SLURM, Open MPI and the machine of a TPU tell, where the command runs in one of them; else it
    runs alone.
    """

    coordinator_address: str | None
    num_processes: int | None
    process_id: int | None

    def __post_init__(self):
        """All three are given, or none."""
        given = [value is not None for value in (self.coordinator_address, self.num_processes, self.process_id)]
        if any(given) != all(given):
            raise ValueError(
                "coordinator_address (host:port of process 0), num_processes and process_id belong together: "
                f"got {self.coordinator_address}, {self.num_processes} and {self.process_id}."
            )
        if self.num_processes is not None and not 0 <= (self.process_id or 0) < self.num_processes:
            raise ValueError(f"process_id is 0 to num_processes - 1: got {self.process_id} of {self.num_processes}.")


def connect(config: DistributedConfig, *, apart: bool = False, saves: bool = False) -> None:
    """Joins the processes of this run. Raises: UserError when they cannot be reached.

    Processes that work `apart` exchange nothing but files: one may end days before another. Others end together, or JAX
    ends them five minutes after the first. SIGTERM ends each at once, but where several are to agree on a step that
    `saves`: then JAX listens.
    """
    if config.coordinator_address is None and not is_one_of_many(os.environ, Path("/dev")):
        return
    jax.config.update("jax_enable_preemption_service", saves)
    try:
        jax.distributed.initialize(
            config.coordinator_address,
            config.num_processes,
            config.process_id,
            shutdown_timeout_seconds=DAYS_APART if apart else MINUTES_APART,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the processes of this run did not find each other ({reason}): start the same command on every host, or "
            "give config.distributed.coordinator_address, .num_processes and .process_id"
        ) from error
    if jax.process_count() == 1:
        end_at_once()
    logging.info(
        "process %d of %d, %d devices here", jax.process_index(), jax.process_count(), jax.local_device_count()
    )


def end_at_once() -> None:
    """Makes SIGTERM end this process where it stands: there is nothing to save, and JAX may listen and swallow it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def from_first(value: Any) -> Any:
    """Returns the value that process 0 has, in all processes, which call this together; it is one that JSON can hold.

    So they do the same where they might see different things: a file, a clock, the memory of a device.
    """
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    return json.loads(multihost_utils.broadcast_one_to_all(np.resize(text, length)).tobytes())


def check_agreed(own: Mapping[str, Any]) -> None:
    """Raises: UserError in all processes, which call this together, where these values of a run differ between them."""
    if jax.process_count() == 1:
        return
    first = from_first(own)
    here = json.loads(json.dumps(own))
    names = sorted(name for name in first.keys() | here.keys() if first.get(name) != here.get(name))
    others = np.flatnonzero(multihost_utils.process_allgather(np.int32(len(names)))).tolist()
    if others:
        what = f" ({', '.join(names)})" if names else ""
        raise UserError(
            f"processes {others} were started with other settings or data than process 0{what}: give every host the "
            "same command, config and tables"
        )


def is_one_of_many(environment: Mapping[str, str], devices: Path) -> bool:
    """Returns whether the surroundings tell of several processes: a cluster's variables, or a TPU's devices."""
    platforms = environment.get("JAX_PLATFORMS", "")
    if not platforms.startswith("cpu") and any((devices / name).exists() for name in TPU_DEVICES):
        return True
    return any(_count(environment.get(name, "")) > 1 for name in COUNTS)


def _count(value: str) -> int:
    return int(value) if value.isdecimal() else len([name for name in value.split(",") if name])
