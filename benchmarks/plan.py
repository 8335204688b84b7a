"""Time and memory of planning what all steps read: `python benchmarks/plan.py --samples 1e5 1e6 5e6`.

The tables are random: images and videos of many sizes, ratios, lengths and frame rates, in shards. The buckets are
those of Open-Sora 2.0's stages (configs/diffusion/train/{image,stage1,stage2}.py there) with more chance: half of the
large ones are left out, and every third line of videos hands some of them on to fewer frames. Each size runs in a
process of its own; memory is what the plan takes on top of the table, at its peak.
"""

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from opensora_jax.data.plan.buckets import Buckets
from opensora_jax.data.plan.plan import Plan

DATA_SHARDS = 8
VIDEO_FRAMES = range(5, 130, 4)


def bucket_config() -> dict[str, dict[int, tuple]]:
    """Returns {resolution: {frames: (keep, batch size) or ((keep, skip), batch size)}}."""
    small = {n: ((1.0, 0.2) if n % 12 == 1 else 1.0, 12 if n <= 33 else 6 if n <= 65 else 3) for n in VIDEO_FRAMES}
    large = {n: ((0.5, 0.3) if n % 12 == 1 else 0.5, 4) for n in VIDEO_FRAMES}
    return {"256px": {1: (1.0, 45)} | small, "768px": {1: (0.5, 13)} | large, "1024px": {1: (0.5, 7)}}


def make_table(count: int) -> pa.Table:
    """Returns a table as `records.read_table` does, without the columns that a plan ignores."""
    rng = np.random.default_rng(0)
    short = rng.choice([256, 360, 480, 720, 768, 1080, 1440], count)
    long = (short * rng.choice([1, 4 / 3, 3 / 2, 16 / 9, 1.85, 2, 2.39], count) / 2).astype(np.int64) * 2
    tall, image = rng.random(count) < 0.3, rng.random(count) < 0.4
    record = np.arange(count) % 1000
    shard = pc.cast(pa.array(np.arange(count) // 1000), pa.string())
    return pa.table(
        {
            "path": join("videos/", shard, "/", pc.cast(pa.array(record), pa.string()), ".mp4"),
            "shard": join("/data/training/shards/clips.array_record-", shard, "-of-05000"),
            "record": record,
            "num_frames": np.where(image, 1, rng.integers(2, 700, count)),
            "height": np.where(tall, long, short),
            "width": np.where(tall, short, long),
            "fps": np.where(image, np.nan, rng.choice([23.976, 24, 25, 29.97, 30, 50, 60], count)),
            "status": pc.if_else(pa.array(rng.random(count) < 0.01), "bad", "ok"),
        }
    )


def join(*parts: str | pa.Array) -> pa.Array:
    """Returns the strings of each row, one after the other."""
    return pc.binary_join_element_wise(*parts, "")


def measure(count: int) -> None:
    """Prints the row of one size."""
    table, buckets = make_table(count), Buckets(bucket_config(), spatial_unit=16, fps_max=24)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before = status_mb("VmRSS")
    plan, planning = timed(lambda: Plan(table, buckets, seed=42, data_shards=DATA_SHARDS, small_buckets="drop"))
    _, first = timed(lambda: plan[0])
    _, middle = timed(lambda: plan[3 * len(plan) + len(plan) // 2])
    _, describing = timed(plan.describe)
    peak = status_mb("VmHWM") - before
    seconds = "".join(f"{value:>12.3f}" for value in (planning, first, middle, describing))
    print(f"{count:>10,}{len(plan.buckets):>9}{len(plan):>10,}{seconds}{peak:>10.0f}", flush=True)


def timed(action: Callable) -> tuple:
    """Returns the result and the seconds."""
    start = time.perf_counter()
    return action(), time.perf_counter() - start


def status_mb(field: str) -> float:
    """Returns a line of this process's status, in MB."""
    return int(re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 1e3


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=float, nargs="+", default=[1e5, 1e6, 5e6])
    parser.add_argument("--one", action="store_true", help="only the row of the first size, in this process")
    given = parser.parse_args()
    if given.one:
        return measure(int(given.samples[0]))
    titles = ("Plan() s", "first s", "mid s", "describe s")
    print(f"{'samples':>10}{'buckets':>9}{'steps':>10}" + "".join(f"{t:>12}" for t in titles) + f"{'peak MB':>10}")
    sys.stdout.flush()
    for count in given.samples:
        subprocess.run([sys.executable, __file__, "--one", "--samples", str(count)], check=True)
    return None


if __name__ == "__main__":
    main()
