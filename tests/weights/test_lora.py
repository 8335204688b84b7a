"""LoRAs of an MMDiT: names, PEFT's files there and back, starting from one, merging one, and Flux's layout."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from opensora_jax.config.errors import UserError
from opensora_jax.models.mmdit import MMDiT
from opensora_jax.nn.lora import LoRAConfig, is_lora, merge_lora
from opensora_jax.parallel.mesh import MeshConfig, make_mesh
from opensora_jax.weights.adapter import read_adapter, write_adapter
from opensora_jax.weights.layouts import to_split
from opensora_jax.weights.lora import adapter_params, base_and_lora, frozen_parameters, merge_adapter, with_lora
from opensora_jax.weights.params import export_params, load_params
from opensora_jax.weights.rename import published_shapes
from tests.models.tiny import mmdit

LORA = LoRAConfig(5, 7.0, ("double_blocks.*.img_attn.*_proj", "single_blocks.*.linear2"), None)
LINEAR2 = ("single_blocks", "blocks", "linear2")
MESH = make_mesh(MeshConfig(2, 2, 1, 2))


def make_model(**changes):
    return lambda: MMDiT(mmdit(**({"grad_ckpt_settings": (0, 1)} | changes)), rngs=nnx.Rngs(0))


def shapes_of(make):
    return nnx.state(nnx.eval_shape(make), nnx.Param)


def weights(make):
    """Returns abstract shapes filled with weights of which no two are equal."""
    rng = np.random.default_rng(0)
    shapes = published_shapes("mmdit", shapes_of(make))
    published = {key: 0.2 * rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
    return load_params("mmdit", published, shapes_of(make))


def lora_params(rank=LORA.rank, config=LORA, seed=1):
    """Returns the parameters of a LoRA, as if it had been trained."""
    flat = [x for x in nnx.to_flat_state(shapes_of(with_lora(make_model(), "mmdit", config, 0))) if is_lora(x[0])]
    rng = np.random.default_rng(seed)
    return nnx.from_flat_state(
        [(path, leaf.replace(jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32))) for path, leaf in flat]
    )


@pytest.fixture
def folder(tmp_path):
    write_adapter(tmp_path / "lora", "mmdit", lora_params(), LORA, "models/base.safetensors")
    return tmp_path / "lora"


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def run(make, params):
    """Returns the velocity for fixed inputs."""
    key = jax.random.split(jax.random.key(3), 4)
    x, text = jax.random.normal(key[0], (2, 1, 4, 4, 2)), jax.random.normal(key[1], (2, 3, 10))
    pooled, condition = jax.random.normal(key[2], (2, 6)), jax.random.normal(key[3], (2, 1, 4, 4, 3))
    model = nnx.merge(nnx.graphdef(nnx.eval_shape(make)), jax.tree.map(jnp.asarray, params))
    return model(x, jnp.asarray([0.3, 0.7]), text, pooled, condition)


def test_a_file_has_the_names_and_shapes_of_peft(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    modules = [f"double_blocks.{i}.img_attn.{part}_proj" for i in range(2) for part in "qkv"]
    modules += [f"single_blocks.{i}.linear2" for i in range(3)]
    assert sorted(tensors) == sorted(f"base_model.model.{m}.lora_{part}.weight" for m in modules for part in "AB")
    assert tensors["base_model.model.single_blocks.1.linear2.lora_A.weight"].shape == (5, 72)
    assert tensors["base_model.model.single_blocks.1.linear2.lora_B.weight"].shape == (24, 5)
    params = lora_params()["single_blocks"]["blocks"]["linear2"]
    ours = params["lora_A"]["kernel"][1]
    np.testing.assert_array_equal(tensors["base_model.model.single_blocks.1.linear2.lora_A.weight"], ours.T)
    about = json.loads((folder / "adapter_config.json").read_text())
    assert (about["peft_type"], about["r"], about["lora_alpha"], about["bias"]) == ("LORA", 5, 7, "none")
    assert sorted(about["target_modules"]) == sorted(modules)
    assert about["base_model_name_or_path"] == "models/base.safetensors"


def test_a_lora_comes_back_bit_by_bit_on_any_mesh(folder):
    found = adapter_params("mmdit", read_adapter(folder), shapes_of(make_model()), MESH)
    jax.tree.map(np.testing.assert_array_equal, found, lora_params())
    assert found["single_blocks"]["blocks"]["linear2"]["lora_B"]["kernel"][...].sharding.spec[2] == "fsdp"


def test_a_merged_lora_is_the_sum_in_published_terms(folder):
    base = weights(make_model())
    before = export_params("mmdit", base)
    tensors = load_file(folder / "adapter_model.safetensors")
    both = nnx.merge_state(base, lora_params())
    expected = run(with_lora(make_model(), "mmdit", LORA, 0), both)
    merged = merge_adapter("mmdit", jax.device_put(base, base_sharding(base)), read_adapter(folder), MESH)
    np.testing.assert_allclose(run(make_model(), jax.device_get(merged)), expected, rtol=2e-4, atol=2e-5)
    after = export_params("mmdit", merged)
    for key, weight in before.items():
        prefix = f"base_model.model.{key.removesuffix('.weight')}.lora_"
        change = (
            7 / 5 * tensors[f"{prefix}B.weight"] @ tensors[f"{prefix}A.weight"] if f"{prefix}A.weight" in tensors else 0
        )
        np.testing.assert_allclose(after[key], weight + change, rtol=1e-5, atol=1e-5)


def base_sharding(params):
    return jax.tree.map(lambda _: jax.sharding.NamedSharding(MESH, jax.sharding.PartitionSpec()), params)


def test_training_starts_from_the_weights_and_the_lora(folder):
    config = LoRAConfig(5, 7.0, (*LORA.targets, "img_in"), str(folder))
    read = base_and_lora(lambda: weights(make_model()), "mmdit", config, MESH)
    flat = {path: leaf for path, leaf in nnx.to_flat_state(read()) if is_lora(path)}
    assert {path[:-2] for path in flat} == {
        *(("double_blocks", "blocks", "img_attn", f"{part}_proj") for part in "qkv"),
        LINEAR2,  # img_in starts anew
    }
    np.testing.assert_array_equal(
        flat[(*LINEAR2, "lora_A", "kernel")][...],
        lora_params()["single_blocks"]["blocks"]["linear2"]["lora_A"]["kernel"],
    )


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (
            LoRAConfig(4, 7.0, LORA.targets, ""),
            r"rank 5 and alpha 7: got config.lora.rank=4 and config.lora.alpha=7; set",
        ),
        (LoRAConfig(5, 8.0, LORA.targets, ""), "config.lora.alpha=8"),
        (LoRAConfig(5, 7.0, LORA.targets[:1], ""), r"config.lora.targets leaves out: single_blocks\.0\.linear2; add"),
    ],
)
def test_a_lora_that_does_not_fit_the_config_is_refused(folder, config, complaint):
    config = LoRAConfig(config.rank, config.alpha, config.targets, str(folder))
    with pytest.raises(UserError, match=complaint):
        base_and_lora(lambda: weights(make_model()), "mmdit", config, MESH)()


def test_a_lora_needs_weights_beside_it():
    with pytest.raises(UserError, match=r"set config\.model\.from_pretrained"):
        base_and_lora(None, "mmdit", LORA, MESH)


def test_layers_that_a_file_lacks_do_nothing(folder):
    path = folder / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if ".1." not in key}, path)
    found = adapter_params("mmdit", read_adapter(folder), shapes_of(make_model()), MESH)["single_blocks"]["blocks"]
    assert found["linear2"]["lora_A"]["kernel"][0].any()
    assert not found["linear2"]["lora_A"]["kernel"][1].any()


def test_names_as_other_programs_write_them_are_read(folder):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    short = {
        key.removeprefix("base_model.model.").replace(".weight", ".default.weight"): t for key, t in tensors.items()
    }
    save_file(short, path)
    edit(folder, use_rslora=True)
    adapter = read_adapter(folder)
    assert adapter.alpha == pytest.approx(7 * np.sqrt(5))
    assert f"{'.'.join(('single_blocks', '0', 'linear2'))}.lora_A.weight" in adapter.tensors


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"peft_type": "LOHA"}, "describes a LOHA: only LORA can be read"),
        ({"use_dora": True}, "has use_dora=True: only False can be read"),
        ({"init_lora_weights": "pissa_niter_4"}, "which changed the weights beneath it"),
        ({"bias": "all"}, "has bias='all'"),
        ({"rank_pattern": {"linear2": 3}}, "has rank_pattern="),
        ({"r": None}, "needs numbers r and lora_alpha"),
    ],
)
def test_loras_of_another_kind_are_refused(folder, changes, complaint):
    edit(folder, **changes)
    with pytest.raises(UserError, match=complaint) as error:
        read_adapter(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rename", "complaint"),
    [
        (("single_blocks.1.linear2.lora_A", "single_blocks.1.linear2.other"), "belongs to no LoRA of a linear layer"),
        (("double_blocks.1", "double_blocks.7"), r"layers that this mmdit lacks: double_blocks\.7\.img_attn"),
    ],
)
def test_tensors_that_fit_nothing_are_refused(folder, rename, complaint):
    path = folder / "adapter_model.safetensors"
    save_file({key.replace(*rename): value for key, value in load_file(path).items()}, path)
    with pytest.raises(UserError, match=complaint):
        adapter_params("mmdit", read_adapter(folder), shapes_of(make_model()), MESH)


def test_half_a_lora_is_refused(folder):
    path = folder / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if "1.linear2.lora_B" not in key}, path)
    with pytest.raises(UserError, match=r"lacks single_blocks\.1\.linear2\.lora_B\.weight"):
        read_adapter(folder)


def test_a_lora_for_flux_does_the_same_in_the_other_layout(tmp_path):
    flux = make_model(fused_qkv=True, use_liger_rope=False)
    config = LoRAConfig(5, 7.0, ("*.qkv", "*.linear1", "*.linear2"), None)
    lora = nnx.from_flat_state(
        [
            (p, leaf.replace(0.3 * jax.random.normal(jax.random.key(len(str(p))), leaf.shape)))
            for p, leaf in nnx.to_flat_state(shapes_of(with_lora(flux, "mmdit", config, 0)))
            if is_lora(p)
        ]
    )
    base = weights(flux)
    expected = run(flux, merge_lora(nnx.merge_state(base, lora), 7.0))
    write_adapter(tmp_path, "mmdit", lora, config, None)
    split = jax.device_get(load_params("mmdit", to_split(export_params("mmdit", base), 2), shapes_of(make_model())))
    adapter = read_adapter(tmp_path).to_split(heads=2)
    merged = merge_lora(nnx.merge_state(split, adapter_params("mmdit", adapter, split, MESH)), 7.0)
    np.testing.assert_allclose(run(make_model(), jax.device_get(merged)), expected, rtol=1e-3, atol=1e-4)
    assert not np.allclose(run(flux, base), expected, atol=1e-2)


def test_only_a_lora_learns_and_names_that_hold_no_layer_are_refused():
    params = shapes_of(with_lora(make_model(), "mmdit", LORA, 0))
    held = frozen_parameters("mmdit", (), LORA)(params)
    assert {path for path, _ in nnx.to_flat_state(params)} - held == {
        path for path, _ in nnx.to_flat_state(lora_params())
    }
    with pytest.raises(UserError, match=r"set config\.optim\.freeze=\(\) or config\.lora=None"):
        frozen_parameters("mmdit", ("img_in",), LORA)
    with pytest.raises(UserError, match=r"config\.lora\.targets: 'img_attn' names nothing here; near it are"):
        with_lora(make_model(), "mmdit", LoRAConfig(2, 2.0, ("img_attn",), None), 0)


def test_freezing_everything_is_refused():
    with pytest.raises(UserError, match=r"\* leave nothing to learn"):
        frozen_parameters("mmdit", ("*",), None)(shapes_of(make_model()))
    assert frozen_parameters("mmdit", (), None)(shapes_of(make_model())) == set()
