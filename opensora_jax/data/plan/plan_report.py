"""What a plan tells before training starts: counts per bucket as a table, and which buckets never give a batch."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from opensora_jax.data.plan.buckets import Bucket
from opensora_jax.data.plan.reasons import EmptyLine

SMALL_BUCKETS = ("error", "drop", "repeat")
SHOWN = 3  # of a kind in an error


class BucketReport(NamedTuple):
    """One bucket of a plan: batch is that of all data shards, carried the first epoch's leftover, repeated the
    copies within each batch.
    """

    bucket: Bucket
    samples: int
    batch: int
    steps: int
    carried: int
    dropped: int
    repeated: int


def as_table(report: Sequence[BucketReport]) -> list[str]:
    """Returns aligned lines: the titles, a bucket per line with "-" for 0, the sums of the first epoch."""
    samples, _, steps, carried, dropped, _ = (sum(column) for column in list(zip(*report, strict=True))[1:])
    numbers = [row[1:] for row in report] + [(samples, "", steps, carried, dropped, "")]
    cells = [BucketReport._fields[1:]] + [[f"{n:,}" if n else "-" if n == 0 else n for n in row] for row in numbers]
    titles = ["bucket", *(str(row.bucket) for row in report), "in all"]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    first = max(map(len, titles))
    return [
        "  ".join([title.ljust(first), *(cell.rjust(width) for cell, width in zip(row, widths, strict=True))]).rstrip()
        for title, row in zip(titles, cells, strict=True)
    ]


def missing_ratios(unused: Sequence[Bucket], empty: Sequence[EmptyLine]) -> list[str]:
    """Returns for each line of bucket_config, but for the empty ones, the aspect ratios without samples."""
    lines = groupby(unused, key=lambda bucket: (bucket.resolution, bucket.num_frames))
    known = {(line.resolution, line.num_frames) for line in empty}
    return [
        f"{resolution}, {frames} frames has no sample of {', '.join(bucket.aspect_ratio for bucket in group)}"
        for (resolution, frames), group in lines
        if (resolution, frames) not in known
    ]


def never_a_batch(small: Mapping[Bucket, int], empty: Sequence[EmptyLine], data_shards: int, small_buckets: str) -> str:
    """Returns the error that names buckets with fewer samples than a batch and lines without any, and what helps."""
    few = [f"{bucket} has {count} for a batch of {bucket.batch_size * data_shards}" for bucket, count in small.items()]
    shown = [*map(str, empty[:SHOWN]), *few[:SHOWN]]
    if more := len(empty) + len(few) - len(shown):
        shown.append(f"and {more} more")
    counts = [f"{len(few)} bucket(s)"] * bool(few) + [f"{len(empty)} line(s) of bucket_config"] * bool(empty)
    ways = [
        "lower their batch size or take them out of bucket_config",
        'give them samples (more data, higher probabilities, or fewer lines and ratios, as in "256px_ar1:1")',
    ]
    helps = [f'"{way}"' for way in SMALL_BUCKETS[1:] if way != small_buckets and not (way == "repeat" and empty)]
    if helps:
        ways.append(f"set small_buckets to {' or '.join(helps)}")
    return (
        f"{' and '.join(counts)} have too few samples for a global batch over {data_shards} data shard(s): "
        f"{'; '.join(shown)}. Ways out: {'; or '.join(ways)}"
    )
