"""Weights reach a model on any mesh from every kind of source; what does not fit is refused, or left random by wish."""

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from opensora_jax.config.errors import UserError
from opensora_jax.models.hunyuan_vae import HunyuanVAEConfig
from opensora_jax.models.mmdit import MMDiT
from opensora_jax.parallel.mesh import MeshConfig, make_mesh
from opensora_jax.weights import workdir
from opensora_jax.weights.files import open_checkpoint, save_safetensors
from opensora_jax.weights.layouts import to_fused, to_split
from opensora_jax.weights.params import export_params, load_params
from opensora_jax.weights.pretrained import (
    DENOISERS,
    describe,
    initial_weights,
    load,
    load_weights,
    open_weights,
    parse_model,
)
from opensora_jax.weights.rename import published_shapes
from tests.models.tiny import mmdit

CONFIG = mmdit()
SECTION = {"type": "mmdit"} | asdict(CONFIG)
PATH = ("single_blocks", "blocks", "linear2", "kernel")


def weights(**changes):
    """A published state dict in which every tensor differs."""
    abstract = nnx.eval_shape(lambda: MMDiT(mmdit(**changes), rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    shapes = published_shapes("mmdit", nnx.state(abstract, nnx.Param))
    return {key: rng.standard_normal(shape).astype(ml_dtypes.bfloat16) for key, shape in shapes.items()}


@pytest.fixture(scope="module")
def published():
    return weights()


@pytest.fixture
def file(tmp_path, published):
    save_safetensors(tmp_path / "model.safetensors", published)
    return str(tmp_path / "model.safetensors")


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(2, 2, 1, 2))


def read(section, mesh, param_dtype=jnp.float32):
    return load_weights(
        SECTION | section, DENOISERS, "config.model", dtype=jnp.float32, mesh=mesh, param_dtype=param_dtype
    )


def leaf(params, path=PATH):
    return dict(nnx.to_flat_state(params))[path].get_value()


def assert_published(params, expected, dtype=jnp.float32):
    exported = export_params("mmdit", params)
    assert exported.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(exported[key], value.astype(dtype), strict=True)


def test_a_checkpoint_does_not_say_how_its_network_is_tiled():
    plain = HunyuanVAEConfig(3, 3, 5, (4, 8, 8), 1, 2, 4, 4, False, 1.0, 0.0)
    tiled = replace(plain, use_spatial_tiling=True, use_temporal_tiling=True, sample_size=64, sample_tsize=32)
    assert describe("hunyuan_vae", plain) == describe("hunyuan_vae", replace(tiled, tile_overlap_factor=0.5))


def test_a_file_goes_into_shards_of_the_mesh(file, mesh, published):
    params = read({"from_pretrained": file}, mesh)
    assert_published(params, published)
    linear2 = leaf(params)
    assert linear2.sharding.spec == jax.sharding.PartitionSpec(None, "tensor", "fsdp")
    assert {shard.data.shape for shard in linear2.addressable_shards} == {(3, 36, 12)}


class Recorded:
    """A tensor that remembers how many of its values were read."""

    def __init__(self, value):
        self.value, self.shape, self.dtype, self.count = value, value.shape, value.dtype, 0

    def __getitem__(self, index):
        part = self.value[index]
        self.count += part.size
        return part


def test_no_more_is_read_than_the_devices_hold(mesh, published):
    abstract = nnx.state(nnx.eval_shape(lambda: MMDiT(CONFIG, rngs=nnx.Rngs(0))), nnx.Param)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "fsdp"))

    def on_two(path, variable):
        value = variable.get_value()
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        return variable.replace(
            jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=rows if path == PATH else whole)
        )

    abstract = nnx.from_flat_state([(path, on_two(path, v)) for path, v in nnx.to_flat_state(abstract)])
    recorded = {key: Recorded(value) for key, value in published.items()}
    load_params("mmdit", recorded, abstract)
    sharded, whole = recorded["single_blocks.1.linear2.weight"], recorded["img_in.weight"]
    assert sharded.count <= len(jax.devices()) // 2 * sharded.value.size
    assert whole.count <= len(jax.devices()) * whole.value.size


def test_import_and_export_change_no_bit(file, mesh, published, tmp_path):
    params = read({"from_pretrained": file}, mesh, param_dtype=None)
    workdir.write(tmp_path / "imported", params, describe("mmdit", CONFIG))
    exported = open_weights(tmp_path / "imported")
    save_safetensors(tmp_path / "out.safetensors", exported)
    written = open_checkpoint(tmp_path / "out.safetensors")
    assert written.keys() == published.keys()
    for key, value in published.items():
        assert written[key].dtype == value.dtype
        np.testing.assert_array_equal(np.asarray(written[key]).view(np.uint16), value.view(np.uint16))


@pytest.fixture
def imported(file, mesh, tmp_path):
    workdir.write(tmp_path / "one", read({"from_pretrained": file}, mesh, None), describe("mmdit", CONFIG))
    return str(tmp_path / "one")


def test_a_workdir_gives_its_weights_in_another_dtype_on_another_mesh(imported, published):
    assert_published(read({"from_pretrained": imported}, make_mesh(MeshConfig(1, 8, 1, 1))), published)


def test_a_workdir_of_another_network_is_refused_by_field(imported, mesh):
    with pytest.raises(UserError, match=r"model\.theta is 100 there and 200 in the config"):
        read({"from_pretrained": imported, "theta": 200}, mesh)


FUSED = {"fused_qkv": True, "use_liger_rope": False}


@pytest.mark.parametrize(
    "section",
    [
        {"theta": 200},
        {"use_liger_rope": False},
        {"theta": 200, "rename_keys": ("img_in:img_in",)},
        {"theta": 200, "layout": "opensora"} | FUSED,
    ],
)
def test_a_workdir_of_another_network_is_refused_however_it_is_read(imported, mesh, section):
    with pytest.raises(UserError, match=r"the checkpoint .*one does not fit the config: model\.(theta|use_liger_rope)"):
        read({"from_pretrained": imported} | section, mesh, None)


def test_a_workdir_changes_its_layout(imported, mesh, published):
    params = read({"from_pretrained": imported, "layout": "opensora"} | FUSED, mesh)
    expected = {key: np.asarray(tensor) for key, tensor in to_fused(published, CONFIG.num_heads).items()}
    assert_published(params, expected)


def test_a_partial_load_from_a_workdir_of_another_network_is_told(imported, mesh, published, caplog):
    with caplog.at_level(logging.WARNING):
        params = read({"from_pretrained": imported, "theta": 200, "strict_load": False}, mesh)
    assert "model.theta is 100 there and 200 in the config" in caplog.text
    assert_published(params, published)


def test_a_workdir_has_no_parts(imported, mesh):
    with pytest.raises(UserError, match=r"a workdir, which has no parts.*leave part='ema' out"):
        read({"from_pretrained": imported, "part": "ema"}, mesh)


def test_a_workdir_is_not_written_over(imported):
    with pytest.raises(UserError, match="has checkpoints already"):
        workdir.check_new(Path(imported))


def test_sampling_holds_parameters_in_the_dtype_it_computes_in(file, mesh):
    model = load(SECTION | {"from_pretrained": file}, DENOISERS, "config.model", dtype=jnp.bfloat16, mesh=mesh)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype(jnp.bfloat16)}


def test_keys_are_renamed(tmp_path, mesh, published):
    save_safetensors(tmp_path / "w.safetensors", {f"module.{key}": value for key, value in published.items()})
    given = {"from_pretrained": str(tmp_path / "w.safetensors"), "rename_keys": ("module.:",)}
    assert_published(read(given, mesh), published)


@pytest.mark.parametrize(
    ("renames", "complaint"),
    [
        (("img_inn:x",), "no key has 'img_inn'"),
        (("img_in:txt_in",), r"makes txt_in\.(weight|bias) of two keys"),
        (("img_in",), "OLD:NEW.*'img_in'"),
    ],
)
def test_renames_that_do_nothing_or_join_keys_are_refused(file, mesh, renames, complaint):
    with pytest.raises(UserError, match=complaint):
        read({"from_pretrained": file, "rename_keys": renames}, mesh)


def test_flux_weights_become_a_split_model(tmp_path, mesh):
    flux = weights(fused_qkv=True, use_liger_rope=False)
    save_safetensors(tmp_path / "flux.safetensors", flux)
    given = {"from_pretrained": str(tmp_path / "flux.safetensors"), "layout": "flux"}
    expected = {key: np.asarray(tensor) for key, tensor in to_split(flux, CONFIG.num_heads).items()}
    assert_published(read(given, mesh), expected)


def test_weights_in_another_layout_are_refused_with_the_way_out(tmp_path, mesh):
    save_safetensors(tmp_path / "flux.safetensors", weights(fused_qkv=True, use_liger_rope=False))
    with pytest.raises(UserError, match=r"missing: double_blocks\S*k_proj.*unexpected: .*qkv.*\(layout\)"):
        read({"from_pretrained": str(tmp_path / "flux.safetensors")}, mesh)


def test_a_layout_that_the_model_has_already_is_refused(file, mesh):
    with pytest.raises(UserError, match="this one has False and True"):
        read({"from_pretrained": file, "layout": "opensora"}, mesh)


def test_a_partial_load_fills_the_rest_freshly_and_says_so(tmp_path, mesh, published, caplog):
    partial = {key: value for key, value in published.items() if "cond_in" not in key}
    partial["single_blocks.1.linear2.weight"] = np.zeros((3, 3), np.float32)  # one layer of a stack
    partial["surprise"] = np.zeros(2, np.float32)
    save_safetensors(tmp_path / "w.safetensors", partial)
    given = {"from_pretrained": str(tmp_path / "w.safetensors")}
    with pytest.raises(UserError, match=r"missing: cond_in.*unexpected: surprise.*is \(3, 3\).*strict_load=False"):
        read(given, mesh)
    with caplog.at_level(logging.WARNING):
        params = read(given | {"strict_load": False}, mesh)
    for said in ("missing", "cond_in.bias, cond_in.weight", "unexpected", "surprise", "wrong shape", "3 of "):
        assert said in caplog.text
    exported = export_params("mmdit", params)
    assert not exported["cond_in.weight"].any()  # a new condition input starts at zero
    linear2 = "single_blocks.{}.linear2.weight"
    np.testing.assert_array_equal(exported[linear2.format(2)], published[linear2.format(2)].astype(np.float32))
    assert 0 < np.std(exported[linear2.format(1)]) < 0.5  # a fresh draw, not the wide one of the file
    np.testing.assert_array_equal(exported["img_in.weight"], published["img_in.weight"].astype(np.float32))


def test_a_file_of_something_else_altogether_is_no_partial_load(tmp_path, mesh):
    save_safetensors(tmp_path / "w.safetensors", {"a": np.zeros(2, np.float32)})
    with pytest.raises(UserError, match="does not fit this mmdit"):
        read({"from_pretrained": str(tmp_path / "w.safetensors"), "strict_load": False}, mesh)


@pytest.mark.parametrize("given", [None, "nowhere.safetensors"])
def test_weights_that_are_not_there_come_with_a_way_to_get_them(mesh, given):
    with pytest.raises(UserError, match=r"config\.model\.from_pretrained: there is no file.*convert download"):
        read({"from_pretrained": given}, mesh)


def test_training_starts_from_a_file_or_at_random(file, mesh, published):
    assert initial_weights(SECTION, DENOISERS, "config.model", mesh=mesh) is None
    assert_published(
        initial_weights(SECTION | {"from_pretrained": file}, DENOISERS, "config.model", mesh=mesh)(), published
    )


def test_fields_of_the_source_are_none_of_the_network(file):
    _, config = parse_model(
        SECTION | {"from_pretrained": file, "rename_keys": (), "strict_load": True, "layout": "same"},
        DENOISERS,
        "config.model",
    )
    assert config == CONFIG
    with pytest.raises(UserError, match=r"config\.model\.layout takes"):
        read({"from_pretrained": file, "layout": "diffusers"}, make_mesh(MeshConfig(8, 1, 1, 1)))


def test_what_an_import_came_from_is_written_beside_it(file, mesh, tmp_path):
    workdir.write(tmp_path / "one", read({"from_pretrained": file}, mesh, None), {"source": file})
    assert json.loads((tmp_path / "one" / "import.json").read_text()) == {"source": file}


def test_settings_of_memory_are_no_part_of_what_a_checkpoint_says_of_its_network():
    other = replace(CONFIG, grad_ckpt_settings=(1, 1), remat_policy="offload")
    assert describe("mmdit", other) == describe("mmdit", CONFIG)
