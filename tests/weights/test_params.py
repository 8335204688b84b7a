"""Published state dicts go in and come out unchanged; what does not fit is named, or left as it is when asked to."""

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from opensora_jax.config.errors import UserError
from opensora_jax.models.clip import CLIPText, CLIPTextConfig
from opensora_jax.models.t5 import T5Config, T5Encoder
from opensora_jax.nn.conv3d import CausalConv3d
from opensora_jax.weights.files import open_checkpoint
from opensora_jax.weights.params import export_params, load_params
from opensora_jax.weights.rename import published_shapes

GOLDENS = Path(__file__).parents[1] / "goldens"
MODELS = {"t5": (T5Config, T5Encoder), "clip": (CLIPTextConfig, CLIPText)}


def abstract_params(kind, fields):
    config_class, module = MODELS[kind]
    return nnx.split(nnx.eval_shape(lambda: module(config_class(**fields), rngs=nnx.Rngs(0))))[1]


def golden(kind, name):
    fields = json.loads((GOLDENS / f"{name}.json").read_text())["config"]
    tensors = open_checkpoint(GOLDENS / f"{name}.safetensors").items()
    published = {key.removeprefix("param/"): np.asarray(v) for key, v in tensors if key.startswith("param/")}
    return published, abstract_params(kind, fields)


@pytest.fixture
def clip():
    return golden("clip", "text_clip_eos_id")


@pytest.fixture
def t5():
    return golden("t5", "text_t5")


@pytest.mark.parametrize(("kind", "name"), [("t5", "text_t5"), ("clip", "text_clip_eos_id")])
def test_a_published_state_dict_comes_out_as_it_went_in(kind, name):
    published, params = golden(kind, name)
    exported = export_params(kind, load_params(kind, published, params))
    assert exported.keys() == published.keys()
    for key, value in published.items():
        np.testing.assert_array_equal(exported[key], value)


@pytest.mark.parametrize(
    ("kind", "name", "extra"),
    [
        ("t5", "t5_v1_1_xxl_encoder", {"feed_forward_proj": "gated-gelu"}),
        ("clip", "clip_vit_large_patch14_text", {"eos_token_id": 2}),
    ],
)
def test_full_size_encoders_have_the_published_keys_and_shapes(kind, name, extra):
    manifest = json.loads((GOLDENS / f"{name}.json").read_text())
    expected = {key: tuple(shape) for key, shape in manifest["state_dict"].items()}
    expected.pop("encoder.embed_tokens.weight", None)  # tied to shared.weight
    assert published_shapes(kind, abstract_params(kind, manifest["config"] | extra)) == expected


def test_kernels_get_output_and_input_axes_first():
    params = nnx.state(nnx.Dict(to_out=CausalConv3d(5, 7, 3, dtype=np.float32, rngs=nnx.Rngs(0))), nnx.Param)
    exported = export_params("hunyuan_vae", params)
    kernel = np.asarray(params["to_out"]["conv"]["kernel"][...])
    assert exported["to_out.conv.weight"].shape == (7, 5, 3, 3, 3)
    assert exported["to_out.conv.weight"][6, 4, 0, 1, 2] == kernel[0, 1, 2, 4, 6]


def test_missing_unexpected_and_misshapen_tensors_are_named(clip):
    published, params = clip
    bias = published.pop("text_model.final_layer_norm.bias")
    published["text_model.final_layer_norm.weight"] = bias[:-1]
    published["text_model.surprise"] = bias
    with pytest.raises(UserError) as caught:
        load_params("clip", published, params)
    for part in (
        "missing: text_model.final_layer_norm.bias",
        "unexpected: text_model.surprise",
        "(31,)",
        "(32,)",
    ):
        assert part in str(caught.value)


def test_only_the_first_few_of_many_faults_are_named(clip):
    with pytest.raises(UserError, match=r"and 33 more\)") as caught:
        load_params("clip", {}, clip[1])
    assert "\n" not in str(caught.value)


def test_parts_of_a_whole_clip_that_we_do_not_have_are_left_out(clip):
    published, params = clip
    strange = {"logit_scale": np.zeros(()), "vision_model.embeddings.position_ids": np.zeros(3)}
    loaded = load_params("clip", published | strange, params)
    np.testing.assert_array_equal(
        loaded["final_layer_norm"]["bias"][...], published["text_model.final_layer_norm.bias"]
    )


@pytest.mark.parametrize("absent", ["shared.weight", "encoder.embed_tokens.weight"])
def test_one_of_two_tied_tensors_suffices(t5, absent):
    published, params = t5
    expected = published.pop(absent)
    np.testing.assert_array_equal(load_params("t5", published, params)["shared"]["table"][...], expected)


def test_tied_tensors_that_differ_are_refused(t5):
    published, params = t5
    published["encoder.embed_tokens.weight"] = published["shared.weight"] + 1
    with pytest.raises(UserError, match=r"encoder.embed_tokens.weight and shared.weight"):
        load_params("t5", published, params)


def test_weights_take_the_dtype_of_the_params(clip):
    published, params = clip
    halves = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, ml_dtypes.bfloat16), params)
    loaded = load_params("clip", published, halves)["layers"]["blocks"]["mlp"]["fc1"]["kernel"][...]
    expected = published["text_model.encoder.layers.1.mlp.fc1.weight"].T.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(loaded[1], expected)
