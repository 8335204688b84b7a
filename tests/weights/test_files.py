"""Files of weights are read whole or refused, lazily, and written complete or not at all."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from opensora_jax.config.errors import UserError
from opensora_jax.models.clip import CLIPTextConfig
from opensora_jax.weights.files import open_checkpoint, read_config, save_safetensors

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "b": np.asarray([1.5, -2.0], ml_dtypes.bfloat16),
    "c": np.asarray(7, np.int64),
}


def assert_same(checkpoint, tensors):
    assert checkpoint.keys() == tensors.keys()
    for key, value in tensors.items():
        assert checkpoint[key].shape == value.shape
        assert np.asarray(checkpoint[key]).dtype == value.dtype
        np.testing.assert_array_equal(np.asarray(checkpoint[key]), value)


def test_the_safetensors_library_reads_what_was_saved(tmp_path):
    save_safetensors(tmp_path / "model.safetensors", TENSORS)
    assert_same(load_file(tmp_path / "model.safetensors"), TENSORS)


def test_a_part_of_a_tensor_is_read_alone(tmp_path):
    save_safetensors(tmp_path / "model.safetensors", TENSORS)
    tensor = open_checkpoint(tmp_path / "model.safetensors")["a"]
    np.testing.assert_array_equal(tensor[1:, :1], TENSORS["a"][1:, :1])


def write_shards(folder):
    save_safetensors(folder / "one.safetensors", {"a": TENSORS["a"], "b": TENSORS["b"]})
    save_safetensors(folder / "two.safetensors", {"c": TENSORS["c"]})
    weight_map = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_a_file_and_its_folder_open_to_what_was_saved(tmp_path):
    save_safetensors(tmp_path / "new" / "model.safetensors", TENSORS)
    assert_same(open_checkpoint(tmp_path / "new" / "model.safetensors"), TENSORS)
    assert_same(open_checkpoint(tmp_path / "new"), TENSORS)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.safetensors"]


def test_shards_open_as_one_checkpoint(tmp_path):
    assert_same(open_checkpoint(write_shards(tmp_path)), TENSORS)
    assert_same(open_checkpoint(tmp_path), TENSORS)


def test_safetensors_go_before_torch_files_in_a_folder(tmp_path):
    save_safetensors(tmp_path / "model.safetensors", TENSORS)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    assert_same(open_checkpoint(tmp_path), TENSORS)


def test_the_folder_of_an_original_training_run_points_to_its_model(tmp_path):
    (tmp_path / "epoch0-global_step5" / "model").mkdir(parents=True)
    with pytest.raises(UserError, match=r"give \S*global_step5/model"):
        open_checkpoint(tmp_path / "epoch0-global_step5")


def test_a_missing_shard_is_named(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(UserError, match=r"two\.safetensors does not exist"):
        open_checkpoint(tmp_path)


def test_a_shard_without_a_promised_tensor_is_named(tmp_path):
    write_shards(tmp_path)
    save_safetensors(tmp_path / "two.safetensors", {"d": TENSORS["c"]})
    with pytest.raises(UserError, match=r"promises c in two\.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_cut_file_is_refused(tmp_path, size):
    path = tmp_path / "model.safetensors"
    save_safetensors(path, TENSORS)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["nothing.safetensors", "weights.bin", "."])
def test_what_is_no_checkpoint_is_refused_by_name(tmp_path, name):
    with pytest.raises(UserError, match=str(tmp_path)):
        open_checkpoint(tmp_path / name)


def test_a_folder_of_several_checkpoints_asks_which(tmp_path):
    for name in ("one", "two"):
        save_safetensors(tmp_path / f"{name}.safetensors", TENSORS)
    with pytest.raises(UserError, match=r"2 checkpoints \(one\.safetensors, two\.safetensors"):
        open_checkpoint(tmp_path)


class Unreadable:
    """A tensor whose file has gone away."""

    shape, dtype = (3,), np.float32

    def __array__(self, dtype=None, copy=None):
        raise OSError("gone")


@pytest.mark.parametrize("bad", [np.asarray(["text", None], object), Unreadable()])
def test_a_failed_save_leaves_the_old_file(tmp_path, bad):
    path = tmp_path / "model.safetensors"
    save_safetensors(path, TENSORS)
    with pytest.raises((TypeError, OSError), match=r"object|gone"):
        save_safetensors(path, TENSORS | {"last": bad})
    assert_same(open_checkpoint(path), TENSORS)
    assert len(list(tmp_path.iterdir())) == 1


FIELDS = {"vocab_size": 7, "hidden_size": 4, "intermediate_size": 5, "num_hidden_layers": 1}
FIELDS |= {"num_attention_heads": 2, "max_position_embeddings": 3, "eos_token_id": 2}


@pytest.mark.parametrize("nest", [lambda fields: fields, lambda fields: {"text_config": fields}])
def test_a_config_is_read_flat_or_nested_and_may_say_more(tmp_path, nest):
    (tmp_path / "config.json").write_text(json.dumps(nest(FIELDS | {"torch_dtype": "float32"})))
    assert read_config(tmp_path, CLIPTextConfig) == CLIPTextConfig(**FIELDS)


@pytest.mark.parametrize("text", ["{}", "[1, 2]", "{", json.dumps(FIELDS | {"hidden_act": "gelu"})])
def test_a_config_of_something_else_is_refused_by_path(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=str(tmp_path / "config.json")):
        read_config(tmp_path, CLIPTextConfig)
