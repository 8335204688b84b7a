"""What cached values were made of, in parts that can be named: a cache of other things is refused, and says of which.

Parts are digests (of weights, captions, clips) and settings as they stand in a config. All are JSON, so that they mean
the same in another version of this package or of Python.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from opensora_jax.data.plan.buckets import Bucket
from opensora_jax.data.plan.digests import clip_names, column_digest, digest
from opensora_jax.data.table.records import take

FACTS = ("record", "size_bytes", "mtime_ns", "num_frames", "height", "width", "fps", "variable_fps")
LONGEST_VALUE = 30  # characters of a setting that a message repeats


@dataclass(frozen=True)
class Identity:
    """Digests by what they are of, in words, and settings by their place in the config."""

    digests: dict[str, str]
    settings: dict[str, Any]

    def __post_init__(self):
        """Make settings equal to what is read back from a file: tuples are lists there."""
        object.__setattr__(self, "settings", json.loads(json.dumps(self.settings, default=str)))

    @cached_property
    def key(self) -> str:
        """A hash of all parts."""
        return digest(json.dumps([self.digests, self.settings], sort_keys=True))

    def differences(self, now: "Identity") -> str:
        """Returns which parts are others now, in words: `other captions, encode.posterior = 'mode' (now 'sample')`."""
        found = [f"other {name}" for name in _unequal(self.digests, now.digests)]
        for name in _unequal(self.settings, now.settings):
            values = [repr(settings.get(name)) for settings in (self.settings, now.settings)]
            short = max(map(len, values)) <= LONGEST_VALUE
            found.append(f"{name} = {values[0]} (now {values[1]})" if short else f"another {name}")
        return ", ".join(found)


def clips_digest(table: pa.Table, rows: Sequence[int] | np.ndarray) -> str:
    """Returns a digest of which clips these rows of a table are: names, sizes, times and probed facts of their files.

    Names count from the folder that all files of the rows lie in. So a folder of data may be moved, or copied with the
    times of its files (`cp -p`, `rsync -a`), and is the same; a file written anew is another one, and so are all if
    their times were not copied and `dataset meta` has probed them again. Rows are told by their number, too.
    """
    rows = np.asarray(rows, np.int64)
    used = pa.table({name: take(table[name], rows) for name in ("path", "shard", *FACTS)})
    names = (column_digest(*part) for part in clip_names(used))
    return digest(rows.astype("<i8").tobytes(), *names, *(column_digest(used[name]) for name in FACTS))


def buckets_digest(rows: Sequence[tuple[Bucket, int]]) -> str:
    """Returns a digest of the shapes that rows are brought to; sizes of batches do not count."""
    numbers: dict[Bucket, int] = {}
    order = np.fromiter((numbers.setdefault(bucket, len(numbers)) for bucket, _ in rows), "<i8", len(rows))
    shapes = [[b.resolution, b.aspect_ratio, b.num_frames, b.height, b.width] for b in numbers]
    return digest(json.dumps(shapes), order.tobytes())


def _unequal(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [name for name in dict.fromkeys([*one, *other]) if one.get(name) != other.get(name)]
