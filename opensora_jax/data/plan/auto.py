"""Lines of a bucket_config whose batch size is left to the memory of the devices: {"256px": {129: (1.0, "auto")}}.

`training/batch_sizes.py` finds the sizes; commands without a use for them put in any.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

AUTO = "auto"

Line: TypeAlias = tuple[str, int]  # resolution, frames
BucketConfig: TypeAlias = Mapping[str, Mapping[int, Any]]


def auto_lines(bucket_config: BucketConfig) -> list[Line]:
    """Returns the lines whose batch size is "auto"."""
    return [
        (resolution, frames)
        for resolution, lines in bucket_config.items()
        for frames, line in lines.items()
        if isinstance(line, tuple | list) and len(line) == 2 and line[1] == AUTO
    ]


def filled(bucket_config: BucketConfig, sizes: Mapping[Line, int]) -> dict[str, dict[int, Any]]:
    """Returns the bucket_config with these batch sizes; all of its lines with "auto" are among them."""
    found = {resolution: dict(lines) for resolution, lines in bucket_config.items()}
    for resolution, frames in auto_lines(bucket_config):
        found[resolution][frames] = (found[resolution][frames][0], sizes[resolution, frames])
    return found


def with_ones(bucket_config: BucketConfig) -> dict[str, dict[int, Any]]:
    """Returns the bucket_config with a batch size of 1 where it says "auto"."""
    return filled(bucket_config, dict.fromkeys(auto_lines(bucket_config), 1))
