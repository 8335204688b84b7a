"""Published files of autoencoders and critics go in and come out: every bit and every key, with the constants."""

from dataclasses import asdict
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from opensora_jax.config.errors import UserError
from opensora_jax.parallel.mesh import MeshConfig, make_mesh
from opensora_jax.weights import workdir
from opensora_jax.weights.constants import constants, stored_constants
from opensora_jax.weights.files import open_checkpoint, save_safetensors
from opensora_jax.weights.pretrained import FREE_FIELDS, MODELS, describe, load_weights, open_weights, parse_model
from opensora_jax.weights.rename import published_shapes
from tests.models.tiny import AUTOENCODERS, CRITICS

ROOT = Path(__file__).parents[2]
SECTIONS = {kind: {"type": kind} | asdict(config) for kind, config in (AUTOENCODERS | CRITICS).items()}
CONSTANTS = {
    "opensora_vae": {"scale": (1, 2, 1, 1, 1), "shift": (1, 2, 1, 1, 1)},
    "discriminator": {"main.3.num_batches_tracked": (), "main.7.num_batches_tracked": ()},
    "lpips": {"scaling_layer.shift": (1, 3, 1, 1), "scaling_layer.scale": (1, 3, 1, 1)},
}


def publish(path, kind, dtype=np.float32, **changes):
    """Writes a file of random weights with all published keys; returns the tensors."""
    module, config = parse_model(SECTIONS[kind], MODELS, "config.ae")
    state = nnx.state(nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    tensors = {key: rng.standard_normal(shape).astype(dtype) for key, shape in published_shapes(kind, state).items()}
    tensors |= constants(config) | changes
    save_safetensors(path, tensors)
    return tensors


def assert_same(path, expected):
    found = open_checkpoint(path)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        np.testing.assert_array_equal(np.asarray(found[key]), tensor, strict=True)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("kind", SECTIONS)
def test_a_published_file_comes_out_as_it_went_in(kind, dtype, tmp_path):
    file, imported, exported = tmp_path / "in.safetensors", tmp_path / "workdir", tmp_path / "out.safetensors"
    tensors = publish(file, kind, dtype)
    assert {key: tensors[key].shape for key in CONSTANTS.get(kind, {})} == CONSTANTS.get(kind, {})
    section, mesh = SECTIONS[kind] | {"from_pretrained": str(file)}, make_mesh(MeshConfig(1, 2, 1, 4))
    params = load_weights(section, MODELS, "config.ae", dtype=jnp.float32, mesh=mesh, param_dtype=None)
    _, config = parse_model(section, MODELS, "config.ae")
    free = {name: value for name, value in asdict(config).items() if name in FREE_FIELDS}
    workdir.write(imported, params, describe(kind, config) | {"free": free})
    meta = workdir.Stored(imported).meta
    save_safetensors(exported, open_weights(imported) | stored_constants(meta, str(imported)))
    assert_same(exported, tensors)


CONFIG = """
from ml_collections import ConfigDict


def get_config():
    mesh = {{"data": 1, "fsdp": 1, "seq": 1, "tensor": 1, "seq_method": "ulysses"}}
    return ConfigDict({{"ae": {section!r}, "mesh": mesh}})
"""


def test_the_command_writes_constants_too_and_refuses_those_of_another_latent(convert, tmp_path):
    file, config = tmp_path / "in.safetensors", tmp_path / "config.py"
    config.write_text(CONFIG.format(section=SECTIONS["opensora_vae"] | {"from_pretrained": str(file)}))
    tensors = publish(file, "opensora_vae")
    done = convert("import", f"--config={config}", "--section=ae", f"--output={tmp_path / 'workdir'}")
    assert done.returncode == 0, done.stderr
    done = convert("export", f"--input={tmp_path / 'workdir'}", f"--output={tmp_path / 'out.safetensors'}")
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "out.safetensors", tensors)


def test_a_layout_of_another_network_than_an_mmdit_is_refused(convert, tmp_path):
    params = nnx.State({"kernel": nnx.Param(jnp.zeros(3))})
    workdir.write(tmp_path / "vae", params, describe("flux_ae", AUTOENCODERS["flux_ae"]) | {"free": {}})
    done = convert("export", f"--input={tmp_path}/vae", f"--output={tmp_path}/x.safetensors", "--layout=flux")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "error: --layout is for an MMDiT, which has two: " in done.stderr


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_latent_that_the_file_normalises_otherwise_is_refused(tmp_path, dtype):
    file = tmp_path / "in.safetensors"
    section = SECTIONS["opensora_vae"] | {"from_pretrained": str(file)}
    read = {"dtype": jnp.float32, "mesh": make_mesh(MeshConfig(1, 1, 1, 8)), "param_dtype": jnp.float32}
    publish(file, "opensora_vae", scale=np.reshape([3.85, 4.0], (1, 2, 1, 1, 1)).astype(dtype))
    there = r"\(3\.85, 4\)" if dtype == np.float32 else r"\(3\.84375, 4\)"
    message = rf"config\.ae\.scale is \(3\.0, 4\.0\) and the file has {there}: set --config\.ae\.scale='{there}', or"
    with pytest.raises(UserError, match=message) as caught:
        load_weights(section, MODELS, "config.ae", **read)
    assert "\n" not in str(caught.value)
    publish(file, "opensora_vae", scale=np.reshape([3.0, 4.0], (1, 2, 1, 1, 1)).astype(dtype))
    load_weights(section, MODELS, "config.ae", **read)
