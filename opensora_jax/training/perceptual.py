"""LPIPS of clips, to measure by: a few frames at a time on each device, so that memory does not grow with the clips."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, UInt8

from opensora_jax.models.codec import to_pixels
from opensora_jax.parallel.mesh import one_device
from opensora_jax.weights.pretrained import CRITICS, Section, load

FRAMES_AT_ONCE = 4  # of each device; VGG's first features are 64 MB a frame of 512 x 512


@dataclass(frozen=True)
class FrameDistance:
    """LPIPS of frames, split over the devices of a mesh; each of them holds all of the network."""

    lpips: nnx.Module
    mesh: Mesh

    @classmethod
    def load(cls, section: Section, mesh: Mesh) -> "FrameDistance":
        """Returns the distance with the weights that a config's `lpips` names. Raises: UserError without them."""
        kinds = {"lpips": CRITICS["lpips"]}
        return cls.on(load(section, kinds, "config.lpips", dtype=jnp.float32, mesh=one_device()), mesh)

    @classmethod
    def on(cls, lpips: nnx.Module, mesh: Mesh) -> "FrameDistance":
        """Returns the distance with its network on all devices of the mesh."""
        graph, params = nnx.split(lpips)
        return cls(nnx.merge(graph, jax.device_put(params, NamedSharding(mesh, PartitionSpec()))), mesh)

    def __call__(
        self, a: UInt8[np.ndarray, "B T H W 3"], b: UInt8[np.ndarray, "B T H W 3"]
    ) -> Float[np.ndarray, "B T"]:
        """Returns the distance of each frame of `a` to that of `b`. Raises: ValueError for frames below 16 pixels."""
        graph, params = nnx.split(self.lpips)
        place = NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names))
        frames = [video.reshape(-1, 1, *video.shape[2:]) for video in (a, b)]
        count, size = len(frames[0]), FRAMES_AT_ONCE * self.mesh.size
        found = []
        for start in range(0, count, size):
            parts = [video[start : start + size] for video in frames]
            filled = [jax.device_put(np.resize(part, (size, *part.shape[1:])), place) for part in parts]
            found.append(np.asarray(_distances(graph, params, *filled)))
        return np.concatenate(found)[:count].reshape(a.shape[:2])


@partial(jax.jit, static_argnums=0)
def _distances(
    graph: nnx.GraphDef, params: Any, a: UInt8[Array, "N 1 H W 3"], b: UInt8[Array, "N 1 H W 3"]
) -> Float[Array, " N"]:
    return nnx.merge(graph, params)(to_pixels(a), to_pixels(b))[:, 0]
