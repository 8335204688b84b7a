"""What this machine holds, or the part of it that a container or a scheduler gives to this process."""

import os
from pathlib import Path

CORES = 2  # for a compiler: two at once on two cores take as long as one after the other
MEMORY = 6 * 2**30  # for a compiler: those of the 11B model take up to 4 GB
LIMITS = (  # of a container's memory, by the two kinds of control groups
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def compilers_at_once() -> int:
    """Returns how many compilers may run at a time: one for each two cores and each 6 GiB, at least one."""
    return max(1, min(len(os.sched_getaffinity(0)) // CORES, _memory_bytes() // MEMORY))


def _memory_bytes() -> int:
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    texts = (path.read_text().strip() for path in LIMITS if path.is_file())
    return min(limits + [int(text) for text in texts if text.isdigit()])
