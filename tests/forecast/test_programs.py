"""The programs that are compiled are those that run: built here on 8 devices made of one CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from opensora_jax.config.build import build
from opensora_jax.config.errors import UserError
from opensora_jax.data.plan.buckets import Bucket
from opensora_jax.forecast import parts, programs
from opensora_jax.forecast.compile import memory_of
from opensora_jax.forecast.jobs import largest_buckets, picked
from opensora_jax.parallel.mesh import MeshConfig, make_mesh
from opensora_jax.training.conditions import CONDITION
from opensora_jax.training.flops import forward_flops, training_flops
from tests.forecast import small

TEXT = {
    "t5": {
        "vocab_size": 31,
        "d_model": 8,
        "d_kv": 4,
        "d_ff": 16,
        "num_layers": 1,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
    }
}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, seq=2, tensor=1))


def training(**changes) -> programs.TrainSections:
    config = small.training()
    config.update(changes)
    return build(programs.TrainSections, picked(config.to_dict(), programs.TrainSections), "config")


def sampling(**changes) -> programs.SampleSections:
    config = small.sampling()
    config.update(changes)
    values = picked(config.to_dict(), programs.SampleSections) | {"text_networks": TEXT}
    return build(programs.SampleSections, values, "config")


def zeros(tree):
    def make(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.device_put(jax.random.key(0), leaf.sharding)
        return jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding)

    return jax.tree.map(make, tree)


def test_the_training_step_runs_as_it_was_built(mesh):
    sections = training(accumulation_steps=2)
    bucket = Bucket("32px", "1:1", 9, 32, 32, 3)
    with jax.set_mesh(mesh):
        program = programs.training_step(sections, bucket, mesh)
        assert program.samples == 3 * 4 * 2  # of a data shard, data shards, parts
        latent = program.arguments[1]["latent"]
        assert latent.shape == (24, 3, 8, 8, 8)
        state, metrics = program.function(*zeros(program.arguments))
    assert int(state.step) == 1
    assert np.isfinite(float(metrics["loss"]))
    video, words = 3 * 4 * 4, sections.t5.max_length
    assert program.flops == 24 * training_flops(sections.recipe.network, video, words)
    assert program.tokens == 24 * (video + words)


def test_bytes_of_the_state_are_those_of_a_device(mesh):
    with jax.set_mesh(mesh):
        program = programs.training_step(training(), Bucket("32px", "1:1", 9, 32, 32, 3), mesh)
    sizes = {name: programs.bytes_on_a_device(tree) for name, tree in program.state.items()}
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(program.state["parameters"]))
    assert whole / 2 <= sizes["parameters"] < 0.52 * whole
    assert sizes["average"] == sizes["parameters"]
    assert 2 * sizes["parameters"] <= sizes["optimiser"] < 2 * sizes["parameters"] + 100
    assert sizes["frozen"] == 0


def test_a_batch_has_the_conditions_and_references_of_the_config(mesh):
    config = small.training()
    config.model.cond_embed = True
    config.dtype = "bfloat16"
    config.condition_config.update(i2v_head=1.0)
    sections = build(programs.TrainSections, picked(config.to_dict(), programs.TrainSections), "config")
    _, batch = programs.training_inputs(sections, Bucket("32px", "1:1", 9, 32, 32, 3), mesh)
    assert batch[CONDITION].shape == (12,)
    assert batch["head"].shape == (12, 1, 8, 8, 8)
    assert {str(leaf.dtype) for name, leaf in batch.items() if name != CONDITION} == {"bfloat16"}


def test_what_does_not_fit_the_networks_is_refused(mesh):
    with pytest.raises(UserError, match=r"divisible by"):
        programs.training_inputs(training(), Bucket("32px", "1:1", 9, 30, 32, 1), mesh)
    wide = small.training()
    wide.model.in_channels = 64
    sections = build(programs.TrainSections, picked(wide.to_dict(), programs.TrainSections), "config")
    with pytest.raises(UserError, match=r"in_channels is 64, but the latents of config\.ae need 32"):
        programs.training_inputs(sections, Bucket("32px", "1:1", 9, 32, 32, 1), mesh)
    with pytest.raises(UserError, match="batch_size a multiple"):
        programs.sampling_step(sampling(batch_size=3), ("cond", "uncond"), mesh)


def test_a_step_of_sampling_runs_its_branches_as_one_batch(mesh):
    sections = sampling()
    with jax.set_mesh(mesh):
        program = programs.sampling_step(sections, ("cond", "uncond"), mesh)
        latents = program.function(*zeros(program.arguments))
    assert latents.shape == (8, 3, 8, 8, 8)
    network = sections.model | {}
    assert program.name == "sample, cond + uncond"
    sizes = {name: programs.bytes_on_a_device(tree) for name, tree in program.state.items()}
    assert sizes["text encoders"] > 31 * 8 * 4 / 2
    assert sizes["autoencoder"] > 0
    assert program.samples == 8
    assert program.flops == pytest.approx(
        16 * forward_flops(programs.parse_model(network, programs.DENOISERS, "config.model")[1], 48, 16)
    )


def test_the_largest_bucket_of_a_line_has_the_most_pixels():
    found = largest_buckets(training())
    assert [(one.resolution, one.num_frames) for one in found] == [("64px_ar1:1", 5), ("32px", 9), ("32px", 1)]


def test_a_decode_is_taken_apart_into_the_programs_it_runs(mesh):
    compiled = {}

    def compile_program(name, function, arguments):
        made = function.lower(*arguments).compile()
        compiled[name] = made
        return jax.tree.leaves(made.output_shardings), memory_of(made).temporary

    with jax.set_mesh(mesh):
        program = programs.decode(sampling(), mesh)
        found = parts.run(program.function, program.arguments, mesh, compile_program)
    assert found.counts.keys() == compiled.keys()
    assert sum(name.startswith("run") for name in found.counts) == 1  # the autoencoder's compiled method
    held = programs.bytes_on_a_device(program.arguments)
    assert found.peak_bytes > held


def test_parts_that_are_the_same_are_compiled_once_and_counted():
    mesh = make_mesh(MeshConfig(8, 1, 1, 1))
    double = jax.jit(lambda x: 2 * x)

    def function(x):
        first = double(x)
        return double(first) + double(x[:4].repeat(2, axis=0))

    made = []

    def compile_program(name, function, arguments):
        made.append(name)
        found = function.lower(*arguments).compile()
        return jax.tree.leaves(found.output_shardings), 0

    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    found = parts.run(function, (x,), mesh, compile_program)
    assert len(made) == len(set(made)) == len(found.counts)
    assert max(found.counts.values()) == 3
    assert found.peak_bytes >= 3 * 8 * 16 * 4


def test_the_autoencoder_is_not_made():
    autoencoder = programs.abstract_autoencoder(small.training().ae.to_dict())
    leaves = jax.tree.leaves(nnx.state(autoencoder))
    assert leaves
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
