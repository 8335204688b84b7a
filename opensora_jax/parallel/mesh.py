"""The device mesh: which devices split the batch, the parameters, and the width of layers.

Source: mesh axes as in maxtext and big_vision; the sizes come from the config, not from code paths.
"""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from opensora_jax.config.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = (
    "data",
    "fsdp",
)  # a batch is split over both: fsdp devices hold parts of the parameters *and* of the batch


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1: all that are left."""

    data: int
    fsdp: int
    tensor: int


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh over `devices` (default: all).

    Raises: UserError when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes, count = list(astuple(config)), len(devices)
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and known > 0 and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    if min(sizes) < 1 or math.prod(sizes) != count:
        asked = ", ".join(f"{name} {size}" for name, size in zip(AXES, astuple(config), strict=True))
        raise UserError(
            f"mesh axes must multiply to the {count} devices here (one may be -1): got {asked}; "
            f"--config.mesh.data=-1 --config.mesh.fsdp=1 --config.mesh.tensor=1 always fits"
        )
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def data_shards(mesh: Mesh) -> int:
    """Returns into how many parts the mesh splits a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
