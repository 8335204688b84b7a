"""Groups of samples go to the devices, one sample to each, and come back as they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import get_abstract_mesh

from opensora_jax.parallel.mesh import MeshConfig, make_mesh, one_device
from opensora_jax.parallel.samples import each_alone, group_of, group_sharding, groups_at_once, one_each


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(2, 1, 2, 2))


def test_a_mesh_takes_as_many_groups_as_give_every_device_one_sample(mesh):
    assert groups_at_once(get_abstract_mesh(), 1) == 1
    assert groups_at_once(one_device(), 1) == groups_at_once(one_device(), 3) == 1
    assert [groups_at_once(mesh, size) for size in (1, 2, 3, 4, 8, 16)] == [8, 4, 1, 2, 1, 1]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_groups_come_back_as_they_were(mesh, size):
    groups = np.random.default_rng(0).normal(size=(8 // size, size, 3)).astype(np.float32)
    groups[1] = np.nan  # of one alone
    with jax.set_mesh(mesh):
        samples = one_each(list(jnp.asarray(groups)))
        assert samples.sharding.shard_shape(samples.shape) == (1, 3)
        found = [group_of(samples, number, size) for number in range(len(groups))]
    np.testing.assert_array_equal(found, groups)
    assert all(group.sharding.is_equivalent_to(group_sharding(mesh, size), 2) for group in found)


def test_a_group_that_no_axis_divides_is_whole_everywhere(mesh):
    assert group_sharding(mesh, 3).is_fully_replicated
    assert group_sharding(mesh, 2).spec[0] == ("data", "fsdp")


def test_each_device_works_on_its_own_samples(mesh):
    """The mean over the batch is that of a device's only sample."""
    with jax.set_mesh(mesh):
        found = each_alone(lambda shift, x: x - x.mean(0) + shift, jnp.float32(2), jnp.arange(8.0)[:, None])
    np.testing.assert_array_equal(found, np.full((8, 1), 2))
