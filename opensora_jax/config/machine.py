"""What this machine holds, or the part of it that a container or a scheduler gives to this process."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

CORES = 2  # for a compiler: two at once on two cores take as long as one after the other
MEMORY = 6 * 2**30  # for a compiler: those of the 11B model take up to 4 GB
GROUP = Path("/proc/self/cgroup")  # lines of number:controllers:path
GROUPS = Path("/sys/fs/cgroup")
LIMITS = "memory.max", "memory/memory.limit_in_bytes"  # by the two kinds of control groups, at their root


def compilers_at_once() -> int:
    """Returns how many compilers may run at a time: one for each two cores and each 6 GiB, at least one."""
    return max(1, min(len(os.sched_getaffinity(0)) // CORES, _memory_bytes() // MEMORY))


def _memory_bytes() -> int:
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    texts = (path.read_text().strip() for path in _limit_files() if path.is_file())
    return min(limits + [int(text) for text in texts if text.isdigit()])


def _limit_files() -> Iterator[Path]:
    """Yields where limits of this process's memory may stand: those of its control group and of all above it."""
    own = [line.split(":", 2)[2] for line in GROUP.read_text().splitlines()] if GROUP.is_file() else []
    for group in {"/", *own}:
        for path in (PurePosixPath(group), *PurePosixPath(group).parents):
            for limit in map(PurePosixPath, LIMITS):
                yield GROUPS / limit.parent / path.relative_to("/") / limit.name
