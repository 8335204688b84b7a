"""A small table of clips, its plan of one bucket, and its batches, for tests of what reads them."""

import numpy as np
import pyarrow as pa

from opensora_jax.data.loader import LoaderConfig, make_loader
from opensora_jax.data.plan.buckets import Buckets
from opensora_jax.data.plan.plan import Plan

COUNT = 23


def clip_table(paths=None, frames=(9, 14)):
    rng = np.random.default_rng(1)
    columns = {
        "path": paths or [f"{i}.mp4" for i in range(COUNT)],
        "num_frames": rng.integers(*frames, len(paths or range(COUNT)), endpoint=True),
    }
    same = {"shard": "", "record": 0, "height": 48, "width": 60, "fps": 8.0, "variable_fps": False, "status": "ok"}
    return pa.table(columns | {name: [value] * len(columns["path"]) for name, value in same.items()})


def make_plan(table, batch_size=4, data_shards=1):
    buckets = Buckets({"48px_ar1:1": {9: (1.0, batch_size)}}, spatial_unit=16, fps_max=24)
    return Plan(table, buckets, seed=3, data_shards=data_shards, small_buckets="repeat")


def batches(plan, source, start=0, count=13, host=(0, 1), num_workers=2, prefetch=2):
    config = LoaderConfig(num_workers, prefetch)
    return list(make_loader(plan, source, start_step=start, num_steps=count, host=host, config=config))
