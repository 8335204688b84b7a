"""The device mesh: which devices split the batch, the parameters, the tokens of a video, and the width of layers.

Source: mesh axes as in maxtext and big_vision; the sizes come from the config, not from code paths.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from opensora_jax.config.errors import UserError

AXES = ("data", "fsdp", "seq", "tensor")
BATCH_AXES = ("data", "fsdp")  # fsdp devices hold parts of the parameters *and* of the batch
TOKEN_AXES = {"ulysses": "seq", "ring": "ring"}  # the name says the method: it is all that a compiled function sees


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1: all that are left.

    `seq_method` is how devices that hold parts of the same videos attend to each other's tokens: `ulysses` trades
    tokens for heads and back, `ring` passes keys and values around.
    """

    data: int
    fsdp: int
    seq: int
    tensor: int
    seq_method: Literal["ulysses", "ring"] = "ulysses"

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Returns the sizes in the order of `AXES`."""
        return self.data, self.fsdp, self.seq, self.tensor


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh over `devices` (default: all); its axis of tokens is called as `TOKEN_AXES` says.

    Raises: UserError when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes, count = list(config.sizes), len(devices)
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and known > 0 and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    if min(sizes) < 1 or math.prod(sizes) != count:
        asked = ", ".join(f"{name} {size}" for name, size in zip(AXES, config.sizes, strict=True))
        raise UserError(
            f"mesh axes must multiply to the {count} devices here (one may be -1): got {asked}; --config.mesh.data=-1 "
            "--config.mesh.fsdp=1 --config.mesh.seq=1 --config.mesh.tensor=1 always fits"
        )
    names = [TOKEN_AXES[config.seq_method] if axis == "seq" else axis for axis in AXES]
    return Mesh(np.asarray(devices).reshape(sizes), names, axis_types=(AxisType.Auto,) * len(AXES))


def this_process() -> Mesh:
    """Returns the mesh of this process's devices, which share weights and batch: it needs no other process."""
    return make_mesh(MeshConfig(data=1, fsdp=-1, seq=1, tensor=1), jax.local_devices())


def one_device() -> Mesh:
    """Returns the mesh of this process's first device alone."""
    return make_mesh(MeshConfig(data=1, fsdp=1, seq=1, tensor=1), jax.local_devices()[:1])


def data_shards(mesh: Mesh | AbstractMesh) -> int:
    """Returns into how many parts the mesh splits a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def token_axis(mesh: Mesh | AbstractMesh) -> str:
    """Returns the name of the axis that splits tokens, which says how attention goes over it."""
    return mesh.axis_names[AXES.index("seq")]


def check_heads(heads: int, mesh: Mesh | AbstractMesh) -> None:
    """Raises: UserError when a mesh that splits tokens cannot split so many attention heads as its method has to."""
    axis, tensor = token_axis(mesh), mesh.shape["tensor"]
    seq = mesh.shape[axis]
    if axis == TOKEN_AXES["ulysses"] and seq > 1 and heads % (seq * tensor):
        raise UserError(
            f"{heads} attention heads do not divide by mesh.seq x mesh.tensor = {seq} x {tensor}: choose sizes whose "
            "product divides them, or mesh.seq_method=ring, which splits heads over mesh.tensor alone"
        )
    if seq > 1 and heads % tensor:
        raise UserError(f"{heads} attention heads do not divide by mesh.tensor = {tensor}: choose a size that does")
