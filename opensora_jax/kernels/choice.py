"""Which backend a call of attention gets, from what is known before it runs; every choice is logged once."""

import functools
import logging
from typing import Literal, NamedTuple

import jax
from jax import Array
from jax.sharding import AbstractMesh, AxisType

MOST_CHANNELS = 256  # of a head that a flash kernel takes
FEW_KEYS = 256
FEW_LOGITS = 2**20  # 4 MiB in float32


Shaped = Array | jax.ShapeDtypeStruct


class Choice(NamedTuple):
    """A backend and the reason for it."""

    backend: Literal["flash", "chunked", "reference"]
    reason: str


def choose(q: Shaped, k: Shaped, v: Shaped, mask: Shaped | None, bias: Shaped | None) -> Choice:
    """Returns the backend for arrays of such shapes, whatever the device; `flash` asks the device in turn."""
    B, L, N, K = q.shape
    S = k.shape[1]
    if bias is not None:
        return Choice("reference", "a bias has a number for every logit")
    if mask is not None and mask.shape[1:3] != (1, 1):
        return Choice("reference", "the mask differs between queries or heads")
    if len({part.dtype for part in (q, k, v)}) > 1:
        return Choice("reference", "queries, keys and values differ in dtype")
    if S < FEW_KEYS or B * N * L * S <= FEW_LOGITS:
        return Choice("reference", "there are few logits")
    return choose_kernel(K)


def choose_kernel(channels: int) -> Choice:
    """Returns the backend for many logits of heads of so many channels."""
    if channels > MOST_CHANNELS:
        return Choice("chunked", f"flash kernels take head sizes up to {MOST_CHANNELS}, not {channels}")
    if is_split(jax.sharding.get_abstract_mesh()):
        return Choice("chunked", "the compiler cannot split a kernel over devices: call it inside shard_map")
    return Choice("flash", "there are many logits")


def left_to_compiler(mesh: AbstractMesh) -> set[str]:
    """Returns the axes over which the compiler splits arrays: those that no `shard_map` around has taken."""
    return {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind is not AxisType.Manual}


def is_split(mesh: AbstractMesh) -> bool:
    """Returns whether the compiler splits arrays over several devices."""
    return any(mesh.shape[name] > 1 for name in left_to_compiler(mesh))


def platform() -> str:
    """Returns the platform that is traced for, as far as can be told: that of the mesh, or the default."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if described is None else described.platform


@functools.cache
def announce(backend: str, reason: str, platform: str) -> None:
    """Logs a choice, once."""
    logging.getLogger("absl").info("attention on %s: %s, since %s", platform, backend, reason)
