"""Host arrays to global arrays: every host brings its slice of the batch, the mesh sees one array."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from opensora_jax.config.errors import UserError
from opensora_jax.parallel.mesh import BATCH_AXES, data_shards
from opensora_jax.parallel.warn import warn_once


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def video_sharding(mesh: Mesh, batch: int, height: int, width: int) -> NamedSharding:
    """Returns how arrays B T H W C are split: over videos as far as they go, then over rows, then over columns.

    `height` and `width` are those of the latent, so that an autoencoder is split alike at every one of its levels: the
    compiler then exchanges the rows at the seams and adds up the statistics of norms, and the result is that of one
    device. A mesh axis that fits nowhere splits nothing, which the log tells once.
    """
    sizes = {0: batch, 2: height, 3: width}
    names: dict[int, list[str]] = {axis: [] for axis in range(5)}
    for name, count in mesh.shape.items():
        axis = next((axis for axis, size in sizes.items() if count > 1 and size % count == 0), None)
        if axis is not None:
            names[axis].append(name)
            sizes[axis] //= count
        elif count > 1:
            warn_once(
                "the %d devices along mesh.%s all do the same work in the autoencoder: neither %d videos nor the %d "
                "rows or %d columns of their latents divide by it",
                *(count, name, batch, height, width),
            )
    return NamedSharding(mesh, PartitionSpec(*(tuple(axes) or None for axes in names.values())))


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """Returns the global batch made of each host's local slice, split over the mesh along the first axis.

    Scalars (the step) are the same on all hosts and go to every device.
    """
    split, whole = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    return {
        name: jax.make_array_from_process_local_data(split if array.ndim else whole, array)
        for name, array in batch.items()
    }


def to_host(array: Array) -> np.ndarray:
    """Returns all of an array in the memory of every process, which all call this if the array is global."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def abstract_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and shardings of what `to_devices` makes of a host's batch."""
    split, whole, (_, count) = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec()), data_share(mesh)

    def shape(array: np.ndarray) -> jax.ShapeDtypeStruct:
        dtype = jax.dtypes.canonicalize_dtype(array.dtype)
        if not array.ndim:
            return jax.ShapeDtypeStruct((), dtype, sharding=whole)
        return jax.ShapeDtypeStruct((array.shape[0] * count, *array.shape[1:]), dtype, sharding=split)

    return {name: shape(array) for name, array in batch.items()}


def batch_size(batch: Mapping[str, Any]) -> int:
    """Returns the samples of a batch, whose arrays may be abstract; images taken from a clip count each."""
    return max(leaf.shape[0] for leaf in batch.values() if leaf.shape)


def data_share(mesh: Mesh) -> tuple[int, int]:
    """Returns (index, count): which of how many equal parts of a global batch this process reads.

    Processes whose devices share samples, because they split the model, read the same part.
    Raises: UserError when the samples of the processes are no such parts.
    """
    shards = data_shards(mesh)
    found: dict[int, set[int]] = {}
    places: Any = batch_sharding(mesh).devices_indices_map((shards,))
    for device, place in places.items():
        found.setdefault(device.process_index, set()).add(place[0].indices(shards)[0])
    mine = sorted(found[jax.process_index()])
    size = len(mine)
    parts = [set(range(start, start + size)) for start in range(0, shards, size)]
    if any(part not in parts for part in found.values()):
        raise UserError(
            f"{len(found)} processes cannot read equal parts of a batch in {shards} shards: choose "
            "mesh.data x mesh.fsdp that divides by the number of processes, or divides it"
        )
    return mine[0] // size, shards // size


def prefetch(batches: Iterable[dict[str, np.ndarray]], mesh: Mesh) -> Iterator[dict[str, Array]]:
    """Yields the global batches; when one is given out, the next is already on its way to the devices."""
    ahead = None
    for batch in batches:
        placed = to_devices(batch, mesh)
        if ahead is not None:
            yield ahead
        ahead = placed
    if ahead is not None:
        yield ahead
