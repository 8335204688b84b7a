import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from opensora_jax.config.build import build
from opensora_jax.config.errors import UserError
from opensora_jax.nn.linear import Linear
from opensora_jax.nn.stack import Stack
from opensora_jax.parallel.batch import prefetch, to_devices
from opensora_jax.parallel.mesh import MeshConfig, check_heads, data_shards, make_mesh, token_axis
from opensora_jax.parallel.rules import param_shardings, param_spec, state_shardings


def test_the_open_axis_takes_the_devices_that_are_left():
    mesh = make_mesh(MeshConfig(data=-1, fsdp=2, seq=1, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "seq": 1, "tensor": 2}
    assert data_shards(mesh) == 4


@pytest.mark.parametrize("sizes", [(3, 1, 1, 1), (-1, 1, 3, 1), (-1, -1, 1, 1), (0, 8, 1, 1), (16, 1, 1, 1)])
def test_axes_that_do_not_multiply_to_the_devices_are_refused(sizes):
    with pytest.raises(UserError, match="multiply to the 8 devices"):
        make_mesh(MeshConfig(*sizes))


def test_an_unknown_way_to_share_tokens_is_refused():
    section = {"data": 8, "fsdp": 1, "seq": 1, "tensor": 1, "seq_method": "rings"}
    with pytest.raises(UserError, match=r"config\.mesh\.seq_method takes 'ulysses' or 'ring': got 'rings'"):
        build(MeshConfig, section, "config.mesh")


def test_the_axis_of_tokens_says_how_they_are_shared():
    assert token_axis(make_mesh(MeshConfig(2, 1, 4, 1))) == "seq"
    assert token_axis(make_mesh(MeshConfig(2, 1, 4, 1, "ring"))) == "ring"


@pytest.mark.parametrize(
    ("heads", "sizes", "message"),
    [
        (6, (2, 1, 4, 1), "6 attention heads do not divide by mesh.seq x mesh.tensor = 4 x 1"),
        (4, (1, 1, 4, 2), "4 attention heads do not divide by mesh.seq x mesh.tensor = 4 x 2"),
        (3, (1, 1, 4, 2, "ring"), "3 attention heads do not divide by mesh.tensor = 2"),
        (24, (1, 1, 4, 2), None),
        (6, (2, 1, 4, 1, "ring"), None),
        (3, (4, 1, 1, 2), None),  # nothing has to be split
    ],
)
def test_heads_that_the_mesh_cannot_split_are_refused_in_one_line(heads, sizes, message):
    mesh = make_mesh(MeshConfig(*sizes))
    if message is None:
        check_heads(heads, mesh)
        return
    with pytest.raises(UserError, match=message) as error:
        check_heads(heads, mesh)
    assert "\n" not in str(error.value)


def test_an_axis_without_a_rule_is_refused_with_those_that_have_one():
    with pytest.raises(UserError, match=r"no rule .* axis 'embedd' .* one of embed, mlp, heads, vocabulary"):
        param_spec(("embedd", "mlp"), (4, 6), make_mesh(MeshConfig(8, 1, 1, 1)))


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
    assert param_spec(axes, shape, make_mesh(MeshConfig(2, 2, 1, 2))) == PartitionSpec(*spec)


def test_copies_of_parameters_are_sharded_like_them_and_counters_are_not():
    mesh = make_mesh(MeshConfig(1, 4, 1, 2))
    params = nnx.state(Stack(lambda rngs: Linear(8, 6, rngs=rngs), 3, rngs=nnx.Rngs(0)), nnx.Param)
    wanted = param_shardings(params, mesh)["blocks"]["kernel"].get_value()
    assert wanted.spec == PartitionSpec(None, "fsdp", "tensor")
    found = state_shardings({"moments": {"mu": params}, "count": jnp.zeros(())}, params, mesh)
    assert found["moments"]["mu"]["blocks"]["kernel"].get_value() == wanted
    assert found["count"].spec == PartitionSpec()


def test_a_batch_is_split_over_data_and_fsdp_and_scalars_are_everywhere():
    batch = to_devices({"x": np.arange(24.0).reshape(8, 3), "step": np.asarray(5)}, make_mesh(MeshConfig(2, 2, 1, 2)))
    assert {shard.data.shape for shard in batch["x"].addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(batch["x"], np.arange(24.0).reshape(8, 3))
    assert batch["step"].sharding.is_fully_replicated
    assert jax.device_count() == 8


def test_prefetched_batches_are_all_there_and_one_ahead():
    asked = []

    def batches():
        for step in range(3):
            asked.append(step)
            yield {"step": np.asarray(step)}

    for expected, batch in enumerate(prefetch(batches(), make_mesh(MeshConfig(2, 2, 1, 2)))):
        assert int(batch["step"]) == expected
        assert asked == list(range(min(expected + 2, 3)))
    assert asked == [0, 1, 2]
    assert list(prefetch([], make_mesh(MeshConfig(2, 2, 1, 2)))) == []
