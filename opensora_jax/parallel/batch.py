"""Host arrays to global arrays: every host brings its slice of the batch, the mesh sees one array."""

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from opensora_jax.parallel.mesh import BATCH_AXES


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """Returns the global batch made of each host's local slice, split over the mesh along the first axis.

    Scalars (the step) are the same on all hosts and go to every device.
    """
    split, whole = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    return {
        name: jax.make_array_from_process_local_data(split if array.ndim else whole, array)
        for name, array in batch.items()
    }
