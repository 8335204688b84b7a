"""Samples that know nothing of each other, such as tiles of a video: every device works on its own, with all weights.

Where none is given, the mesh is that of JAX's context (`jax.set_mesh`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, get_abstract_mesh
from jaxtyping import Shaped

R = TypeVar("R")


def groups_at_once(mesh: Mesh | AbstractMesh, size: int) -> int:
    """Returns how many groups of so many samples give every device one; 1 if the devices cannot share them out."""
    return mesh.size // size if mesh.size and mesh.size % size == 0 else 1  # that of no mesh is 0


def group_sharding(mesh: Mesh, size: int) -> NamedSharding:
    """Returns the sharding of a group of so many samples: over the axes of the mesh that can share it, else whole."""
    return NamedSharding(mesh, _split(mesh, size))


def each_alone(function: Callable[..., R], params: Any, *samples: Any) -> R:
    """Returns `function(params, *samples)`, split over all devices along the first axis of samples and of results."""
    split = _split(get_abstract_mesh())
    specs = (PartitionSpec(), *(split for _ in samples))
    return jax.shard_map(function, in_specs=specs, out_specs=split, check_vma=False)(params, *samples)


@jax.jit
def one_each(groups: list[Shaped[Array, "B ..."]]) -> Shaped[Array, "D ..."]:
    """Returns as many groups as `groups_at_once` says as one array, of which every device has one sample."""
    joined = jnp.stack(groups, axis=1)  # by sample, so that devices that share a sample lie side by side
    return jax.lax.with_sharding_constraint(joined.reshape(-1, *joined.shape[2:]), _split(get_abstract_mesh()))


@partial(jax.jit, static_argnames="size")
def group_of(samples: Shaped[Array, "D ..."], number: int | Array, size: int) -> Shaped[Array, "B ..."]:
    """Returns one of these groups of so many samples again, as `group_sharding` says."""
    by_group = samples.reshape(size, -1, *samples.shape[1:])
    wanted = (jnp.arange(by_group.shape[1]) == number).reshape(-1, *[1] * (samples.ndim - 1))
    # One group travels, where a slice would move all of them.
    found = jnp.where(wanted, by_group, 0).sum(1, dtype=samples.dtype)
    return jax.lax.with_sharding_constraint(found, _split(get_abstract_mesh(), size))


def _split(mesh: Mesh | AbstractMesh, samples: int = 0) -> PartitionSpec:
    """Returns the spec of a first axis over the leading axes of the mesh that divide it; 0: all of them."""
    names = []
    for name, devices in mesh.shape.items():
        if samples % devices:
            break
        samples //= devices
        names.append(name)
    return PartitionSpec(tuple(names) or None)
