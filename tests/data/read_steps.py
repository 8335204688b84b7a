"""A process of test_processes.py: reads its part of some steps and prints what the mesh of all processes holds then."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jax.sharding import NamedSharding, PartitionSpec

from opensora_jax.data.loader import make_loader
from opensora_jax.data.media.video import VideoError
from opensora_jax.data.plan.buckets import Buckets
from opensora_jax.data.plan.plan import Plan, mix
from opensora_jax.parallel.batch import to_devices
from opensora_jax.parallel.mesh import MeshConfig, data_shards, make_mesh

DEVICES = 4
START, STEPS = 6, 17  # from the middle of the first epoch into the second
PRIME = np.uint32(2654435761)


def make_plan(shards):
    """Returns the plan of 61 videos and 38 images in batches of 2 and 1 for each data shard."""
    frames = np.where(np.arange(99) % 13 < 8, 9, 1)
    same = {"height": np.full(99, 48), "width": np.full(99, 60), "fps": np.where(frames == 1, np.nan, 8.0)}
    buckets = Buckets({"48px_ar1:1": {9: (1.0, 2), 1: (1.0, 1)}}, spatial_unit=16, fps_max=24)
    return Plan(pa.table({"num_frames": frames} | same), buckets, seed=11, data_shards=shards)


class Noise:
    """Arrays that the sample and its seed determine."""

    def __init__(self, bad):
        self.bad = bad

    def read(self, sample_id, bucket, seed):
        if sample_id in self.bad:
            raise VideoError(f"sample {sample_id} is bad")
        return {"noise": mix(seed, sample_id, np.arange(3 * bucket.num_frames)).astype(np.uint32).reshape(-1, 3)}

    def refuse(self, sample_id, error):
        pass


def digest(noise, xp):
    """Returns a number that depends on every value and its place; exact, in whatever order it is summed."""
    places = xp.arange(noise.size, dtype=xp.uint32).reshape(noise.shape)
    return ((noise ^ (places * PRIME)) * PRIME).sum(dtype=xp.uint32)


def main(index, count, address, *bad):
    """Prints a list of [step, sample ids, digest] as JSON for all samples good, and for these bad."""
    jax.distributed.initialize(address, count, index)
    assert (jax.device_count(), jax.local_device_count()) == (DEVICES, DEVICES // count)
    mesh = make_mesh(MeshConfig(2, 2, 1, 1))
    whole = NamedSharding(mesh, PartitionSpec())
    look = jax.jit(lambda batch: batch | {"noise": digest(batch["noise"], jnp)}, out_shardings=whole)
    plan = make_plan(data_shards(mesh))
    found = []
    for source in (Noise(()), Noise(bad)):
        loader = make_loader(plan, source, start_step=START, num_steps=STEPS, host=(index, count))
        seen = [jax.device_get(look(to_devices(batch, mesh))) for batch in loader]
        found.append([[int(s["step"]), s["sample_id"].tolist(), int(s["noise"])] for s in seen])
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:]))
