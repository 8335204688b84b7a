"""How fast the loader decodes beside ffmpeg run by hand, and whether a training step ever waits for it.

    python benchmarks/data.py                       720p clips made here
    python benchmarks/data.py --videos=my_videos    clips of your own

Both cut the same frames out of the same clips and scale them alike, with as many ffmpeg processes at a time; by hand
the pixels go to /dev/null, the loader's become batches. The second table is a loop whose steps take longer than the
loader's batches, which come to it as in training, one of them ahead on the device: the time it waited for data.
"""

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa

from opensora_jax.data.clip_source import ClipSource, read_scaled
from opensora_jax.data.loader import LoaderConfig, make_loader
from opensora_jax.data.media.ffmpeg_process import binary
from opensora_jax.data.media.transforms import frame_start, resize_and_crop, target_fps
from opensora_jax.data.media.video import PILLOWS_KERNEL, SCALE_FLAGS
from opensora_jax.data.plan.buckets import Buckets
from opensora_jax.data.plan.plan import Plan
from opensora_jax.data.table.probing import describe
from opensora_jax.data.table.records import SCHEMA
from opensora_jax.parallel.batch import prefetch
from opensora_jax.parallel.mesh import one_device

FPS_MAX = 24


def make_videos(folder: Path, count: int) -> None:
    """Writes `count` clips of 4 seconds, 1280x720 at 24 frames per second, that move and have grain."""
    for number in range(count):
        source = f"mandelbrot=size=1280x720:rate=24:start_scale={3 / (number + 1)},noise=alls=6:allf=t,format=yuv420p"
        command = ["-f", "lavfi", "-i", source, "-t", "4", "-c:v", "libx264", "-crf", "23", "-preset", "veryfast"]
        subprocess.run([binary(), "-v", "error", *command, str(folder / f"{number}.mp4")], check=True)


def prepare(paths: list[Path]) -> tuple[pa.Table, Plan, ClipSource]:
    """Returns the table of these clips, the plan of their only bucket, and what reads them."""
    table = pa.Table.from_pylist([describe(str(path.absolute())) | {"text": ""} for path in paths], schema=SCHEMA)
    buckets = Buckets({"256px_ar16:9": {33: (1.0, 8)}}, spatial_unit=16, fps_max=FPS_MAX)
    plan = Plan(table, buckets, seed=0, data_shards=1, small_buckets="repeat")
    return table, plan, ClipSource(table, read_scaled, fps_max=FPS_MAX, cache_bytes=0, max_bad_rate=0.0)


def read_by_hand(table: pa.Table, row: int, seed: int, plan: Plan) -> None:
    """Runs one ffmpeg for what the loader reads of a row."""
    info = {name: table[name][row].as_py() for name in ("path", "num_frames", "height", "width", "fps")}
    bucket = plan.buckets[0]
    _, interval = target_fps(info["fps"], FPS_MAX)
    start = frame_start(info["num_frames"], bucket.num_frames, interval, seed)
    (h, w), (top, left, tall, wide) = resize_and_crop(info["height"], info["width"], (bucket.height, bucket.width))
    kernel = ":".join(f"{name}={value}" for name, value in PILLOWS_KERNEL.items())
    scale = f"scale={w}:{h}:flags={SCALE_FLAGS}:{kernel}"
    filters = f"select=not(mod(n\\,{interval})),{scale},format=rgb24,crop={wide}:{tall}:{left}:{top}"
    seek = ["-ss", f"{max(start - 0.5, 0) / info['fps']:.6f}"] if start else []
    output = ["-frames:v", str(bucket.num_frames), "-fps_mode", "passthrough", "-f", "rawvideo", "-y", os.devnull]
    command = [binary(), "-nostdin", "-v", "error", "-threads", "1", *seek, "-i", info["path"], "-vf", filters, *output]
    subprocess.run(command, check=True)


def by_hand(table: pa.Table, plan: Plan, steps: int, threads: int) -> float:
    """Returns clips per second of ffmpeg alone."""
    pairs = [pair for step in range(steps) for pair in zip(*(part.tolist() for part in plan[step][1:]), strict=True)]
    before = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda pair: read_by_hand(table, *pair, plan), pairs))
    return len(pairs) / (time.perf_counter() - before)


def by_loader(source: ClipSource, plan: Plan, steps: int, config: LoaderConfig) -> float:
    """Returns clips per second of the loader."""
    before = time.perf_counter()
    clips = sum(
        len(batch["video"]) for batch in make_loader(plan, source, start_step=0, num_steps=steps, config=config)
    )
    return clips / (time.perf_counter() - before)


def waits(source: ClipSource, plan: Plan, steps: int, config: LoaderConfig, step_seconds: float) -> list[float]:
    """Returns how long each step but the first waited for its batch, when each then takes `step_seconds`."""
    loader = make_loader(plan, source, start_step=0, num_steps=steps, config=config)
    found, placed = [], prefetch(loader, one_device())
    for _ in range(steps):
        before = time.perf_counter()
        next(placed)
        found.append(time.perf_counter() - before)
        time.sleep(step_seconds)
    return found[1:]


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, help="folder of .mp4 files")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="clips read at a time")
    parser.add_argument("--steps", type=int, default=6, help="batches of each run")
    parser.add_argument("--runs", type=int, default=5, help="of each, in turn")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.videos is None:
            make_videos(Path(folder), 12)
        table, plan, source = prepare(sorted((given.videos or Path(folder)).glob("*.mp4")))
        config = LoaderConfig(num_workers=given.threads, prefetch=2)
        speeds: tuple[list[float], list[float]] = ([], [])
        for _ in range(given.runs):
            speeds[0].append(by_hand(table, plan, given.steps, given.threads))
            speeds[1].append(by_loader(source, plan, given.steps, config))
        print(f"{len(table)} clips, {plan.buckets[0]}, {given.threads} at a time, {os.cpu_count()} cores")
        print(f"{'decode':<16}{'clips/s':>10}{'frames/s':>10}{'share':>8}")
        for name, values in zip(("ffmpeg by hand", "loader"), speeds, strict=True):
            speed = statistics.median(values)
            share = statistics.median(a / b for a, b in zip(values, speeds[0], strict=True))
            print(f"{name:<16}{speed:>10.2f}{33 * speed:>10.0f}{share:>8.2f}")
        batch_seconds = plan.batch_size(plan.buckets[0]) / statistics.median(speeds[1])
        print(f"\n{'step s':>10}{'batch s':>10}{'mean wait s':>14}{'longest s':>12}")
        found = waits(source, plan, 2 * given.steps, config, 1.5 * batch_seconds)
        print(f"{1.5 * batch_seconds:>10.2f}{batch_seconds:>10.2f}{np.mean(found):>14.4f}{max(found):>12.4f}")


if __name__ == "__main__":
    main()
