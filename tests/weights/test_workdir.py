"""Checkpoints of runs in which some parameters did not learn: read as one set of weights."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from opensora_jax.config.errors import UserError
from opensora_jax.parallel.mesh import MeshConfig, make_mesh
from opensora_jax.weights.workdir import Stored


def params(seed, *names):
    rng = np.random.default_rng(seed)
    return nnx.from_flat_state(
        [((*name.split("."),), nnx.Param(jnp.asarray(rng.standard_normal((4, 3)), jnp.float32))) for name in names]
    )


@pytest.fixture
def workdir(tmp_path):
    state = {
        "step": jnp.int32(7),
        "params": params(0, "a.kernel"),
        "ema": params(1, "a.kernel"),
        "frozen": params(2, "a.bias", "b.kernel"),
    }
    with ocp.CheckpointManager((tmp_path / "checkpoints").absolute()) as manager:
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave({"ema": True}))
        manager.save(7, args=items)
    return tmp_path, state


def test_learnt_and_frozen_parameters_are_read_together(workdir):
    folder, state = workdir
    whole = nnx.merge_state(state["ema"], state["frozen"])
    sharding = NamedSharding(make_mesh(MeshConfig(4, 1, 1, 2)), PartitionSpec("data"))
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=sharding), whole)
    found = Stored(folder).read(abstract)
    assert {leaf.sharding for leaf in jax.tree.leaves(found)} == {sharding}
    jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), whole))


def test_arrays_are_read_one_by_one(workdir, monkeypatch):
    folder, state = workdir
    bounds, make = [], ocp.PyTreeCheckpointHandler
    monkeypatch.setattr(ocp, "PyTreeCheckpointHandler", lambda **given: bounds.append(given) or make(**given))
    whole = nnx.merge_state(state["ema"], state["frozen"])
    Stored(folder).read(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), whole))
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(whole))
    assert largest < 1e9 * bounds[-1]["restore_concurrent_gb"] < 1.1 * largest


def test_as_many_arrays_stay_in_memory_as_are_asked_for(workdir, monkeypatch):
    read, restore = [], Stored._restore
    monkeypatch.setattr(Stored, "_restore", lambda *args: read.append(args) or restore(*args))
    for held, count in ((1, 6), (3, 3)):
        read.clear()
        for _, array in Stored(workdir[0], held).arrays() * 2:  # two rounds
            assert array[1:].shape == (3, 3)
        assert len(read) == count


def test_a_lora_alone_is_no_model(tmp_path):
    with ocp.CheckpointManager((tmp_path / "checkpoints").absolute()) as manager:
        state = {"params": params(0, "a.lora_A.kernel", "a.lora_B.kernel")}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave({"ema": False}))
        manager.save(7, args=items)
    with pytest.raises(UserError, match="holds a LoRA, no model: merge"):
        Stored(tmp_path).arrays()


def test_tensors_are_listed_and_read_one_by_one(workdir):
    folder, state = workdir
    found = dict(Stored(folder).arrays())
    assert found.keys() == {("a", "kernel"), ("a", "bias"), ("b", "kernel")}
    np.testing.assert_array_equal(np.asarray(found[("a", "kernel")]), state["ema"]["a"]["kernel"][...])
    np.testing.assert_array_equal(found[("b", "kernel")][1:3], state["frozen"]["b"]["kernel"][1:3])
