"""Host arrays to global arrays: every host brings its slice of the batch, the mesh sees one array."""

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from opensora_jax.parallel.mesh import BATCH_AXES


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def video_sharding(mesh: Mesh, batch: int, height: int, width: int) -> NamedSharding:
    """Returns how arrays B T H W C are split: over videos as far as they go, then over rows, then over columns.

    `height` and `width` are those of the latent, so that an autoencoder is split alike at every one of its levels: the
    compiler then exchanges the rows at the seams and adds up the statistics of norms, and the result is that of one
    device. A mesh axis that fits nowhere splits nothing.
    """
    sizes = {0: batch, 2: height, 3: width}
    names: dict[int, list[str]] = {axis: [] for axis in range(5)}
    for name, count in mesh.shape.items():
        axis = next((axis for axis, size in sizes.items() if count > 1 and size % count == 0), None)
        if axis is not None:
            names[axis].append(name)
            sizes[axis] //= count
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
