import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from opensora_jax.config.errors import UserError
from opensora_jax.nn.linear import Linear
from opensora_jax.nn.stack import Stack
from opensora_jax.parallel.batch import to_devices
from opensora_jax.parallel.mesh import MeshConfig, data_shards, make_mesh
from opensora_jax.parallel.rules import param_shardings, param_spec, state_shardings


def test_the_open_axis_takes_the_devices_that_are_left():
    mesh = make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert data_shards(mesh) == 4


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 8, 1), (16, 1, 1)])
def test_axes_that_do_not_multiply_to_the_devices_are_refused(sizes):
    with pytest.raises(UserError, match="multiply to the 8 devices"):
        make_mesh(MeshConfig(*sizes))


@pytest.mark.parametrize(
    ("axes", "shape", "spec"),
    [
        (("embed", "mlp"), (4, 6), ("fsdp", "tensor")),
        (("embed", "mlp"), (3, 6), (None, "tensor")),  # 3 does not divide by 2
        (("embed", "embed"), (4, 4), ("fsdp", None)),  # a mesh axis splits one dimension at most
        (("embed", "mlp"), (7, 4, 6), (None, "fsdp", "tensor")),  # scanned layers
        ((None,), (4,), (None,)),
    ],
)
def test_logical_axes_become_mesh_axes_where_they_fit(axes, shape, spec):
    assert param_spec(axes, shape, make_mesh(MeshConfig(2, 2, 2))) == PartitionSpec(*spec)


def test_copies_of_parameters_are_sharded_like_them_and_counters_are_not():
    mesh = make_mesh(MeshConfig(1, 4, 2))
    params = nnx.state(Stack(lambda rngs: Linear(8, 6, rngs=rngs), 3, rngs=nnx.Rngs(0)), nnx.Param)
    wanted = param_shardings(params, mesh)["blocks"]["kernel"].get_value()
    assert wanted.spec == PartitionSpec(None, "fsdp", "tensor")
    found = state_shardings({"moments": {"mu": params}, "count": jnp.zeros(())}, params, mesh)
    assert found["moments"]["mu"]["blocks"]["kernel"].get_value() == wanted
    assert found["count"].spec == PartitionSpec()


def test_a_batch_is_split_over_data_and_fsdp_and_scalars_are_everywhere():
    batch = to_devices({"x": np.arange(24.0).reshape(8, 3), "step": np.asarray(5)}, make_mesh(MeshConfig(2, 2, 2)))
    assert {shard.data.shape for shard in batch["x"].addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(batch["x"], np.arange(24.0).reshape(8, 3))
    assert batch["step"].sharding.is_fully_replicated
    assert jax.device_count() == 8
