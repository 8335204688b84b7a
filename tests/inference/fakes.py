"""An autoencoder, text encoders and clips whose results a test can foresee."""

import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from flax import nnx

from opensora_jax.data.cache.cache_key import Identity
from opensora_jax.data.cache.latent_writer import LatentWriter
from opensora_jax.data.cache.latents import CacheInfo
from opensora_jax.data.clip_source import ClipSource, read_scaled
from opensora_jax.data.media.video import VideoError
from opensora_jax.data.plan.buckets import Bucket
from opensora_jax.inference.latents import ClipWork, LatentConfig
from opensora_jax.models.codec import Codec
from opensora_jax.parallel.mesh import one_device


@dataclass(frozen=True)
class AutoencoderConfig:
    """What a config would say of it."""

    scale_factor: tuple[float, ...] = (1.0, 2.0)


class Autoencoder(nnx.Module):
    """Keeps every fourth pixel and frame; decoding repeats them."""

    strides, is_causal, latent_channels = (4, 4, 4), True, 3
    config = AutoencoderConfig()

    def __init__(self):
        self.gain = nnx.Param(jnp.float32(1.0))

    def latent_shape(self, frames, height, width):
        return (frames - 1) // 4 + 1, height // 4, width // 4

    def gives_back(self, frames):
        return frames % 4 == 1

    def encode(self, video, keys=None):
        return self.gain[...] * video[:, ::4, ::4, ::4]

    def unscaled(self, video):
        return self.encode(video)

    def decode(self, latent):
        frames = jnp.repeat(latent, 4, axis=1)[:, 3:]
        return jnp.repeat(jnp.repeat(frames, 4, axis=2), 4, axis=3)


def encode_text(prompts):
    seeds = [sum(map(ord, prompt)) for prompt in prompts]
    rows = [jax.random.normal(jax.random.key(seed), (7,)) for seed in seeds]
    return jnp.stack(rows)[:, :6].reshape(-1, 2, 3), jnp.stack(rows)[:, 6:]


def clip_of(row, bucket):
    shape = (bucket.num_frames, bucket.height, bucket.width, 3)
    return np.random.default_rng(row).integers(0, 256, shape, np.uint8)


class Clips(ClipSource):
    """Clips of noise drawn by the number of their row; some cannot be read, and each takes its time."""

    def __init__(self, table: pa.Table, broken=(), seconds=0.0, max_bad_rate=0.5):
        super().__init__(table, read_scaled, fps_max=24, cache_bytes=0, max_bad_rate=max_bad_rate)
        self.broken, self.seconds, self.asked = broken, seconds, []

    def _video(self, sample_id, bucket, seed):
        time.sleep(self.seconds)
        self.asked.append(sample_id)
        if sample_id in self.broken:
            raise VideoError(f"broken in {sample_id % 2} places")
        return clip_of(sample_id, bucket)


BUCKETS = Bucket("8px", "1:1", 5, 8, 8, 1), Bucket("8px", "3:2", 1, 12, 8, 1)
COUNT = 23


def clip_table():
    """Returns the table of 23 clips, the last nine of them images."""
    image = [row > 13 for row in range(COUNT)]
    facts = {"height": 12, "width": 12, "variable_fps": False, "mtime_ns": 1, "size_bytes": 2, "record": 0, "shard": ""}
    columns = {
        "path": [f"/clips/{row}.mp4" for row in range(COUNT)],
        "text": [f"clip {row % 5}" for row in range(COUNT)],
        "num_frames": [1 if one else 5 for one in image],
        "fps": [float("nan") if one else 8.0 for one in image],
    }
    return pa.table(columns | {name: [value] * COUNT for name, value in facts.items()})


def clip_work(folder, *, posterior="mode", batch_size=2, ends=(), **clips):
    """Returns what writes the latents of the table, in shards of 4 clips, and the work."""
    rows = [(BUCKETS[row > 13], row) for row in range(COUNT)]
    config = LatentConfig(batch_size, posterior, 3, None, 4)
    writer = LatentWriter(folder, CacheInfo("dataset encode", Identity({}, {}), "float32", COUNT, 4, 0, 1))
    codec = Codec(Autoencoder(), one_device())
    return writer, ClipWork(codec, Clips(clip_table(), **clips), rows, config, ends=ends)
