"""CLIP's text tower against golden files of Hugging Face's torch model, both meanings of the end token."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opensora_jax.models.clip import CLIPText, CLIPTextConfig, end_of_text
from opensora_jax.weights.files import open_checkpoint
from opensora_jax.weights.rename import load_params

GOLDENS = Path(__file__).parents[1] / "goldens"
TOLERANCE = 2e-5  # of the largest value


@pytest.mark.parametrize("name", ["text_clip_legacy_eos2", "text_clip_eos_id"])
def test_clip_equals_the_published_text_tower(name):
    tensors = {key: np.asarray(v) for key, v in open_checkpoint(GOLDENS / f"{name}.safetensors").items()}
    config = CLIPTextConfig(**json.loads((GOLDENS / f"{name}.json").read_text())["config"])
    graphdef, params = nnx.split(nnx.eval_shape(lambda: CLIPText(config, rngs=nnx.Rngs(0))))
    published = {key.removeprefix("param/"): v for key, v in tensors.items() if key.startswith("param/")}
    model = nnx.merge(graphdef, load_params("clip", published, params))
    with jax.default_matmul_precision("highest"):
        outputs = model(jnp.asarray(tensors["in/input_ids"], jnp.int32))
    for output, key in zip(outputs, ("last_hidden_state", "pooler_output"), strict=True):
        expected = tensors[f"out/{key}"]
        assert np.abs(output - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_the_end_is_the_first_end_token_or_by_old_configs_the_first_largest_id():
    ids = jnp.asarray([[5, 3, 9, 9, 9], [5, 9, 3, 9, 11]])
    assert end_of_text(ids, 9).tolist() == [2, 1]
    assert end_of_text(ids, 2).tolist() == [2, 4]


def make_config(**changes):
    fields = {"vocab_size": 7, "hidden_size": 6, "intermediate_size": 5, "num_hidden_layers": 1}
    fields |= {"num_attention_heads": 3, "max_position_embeddings": 11, "eos_token_id": 1}
    return CLIPTextConfig(**fields | changes)


def test_later_tokens_do_not_change_earlier_outputs():
    model = CLIPText(make_config(num_hidden_layers=2), rngs=nnx.Rngs(0))
    short, _ = model(jnp.asarray([[0, 3, 5, 1]]))
    long, _ = model(jnp.asarray([[0, 3, 5, 1, 6, 6, 2]]))
    np.testing.assert_allclose(short, long[:, :4], atol=1e-5)


@pytest.mark.parametrize(("field", "value"), [("hidden_act", "gelu"), ("num_attention_heads", 4)])
def test_unsupported_configs_are_refused_by_field(field, value):
    with pytest.raises(ValueError, match=field):
        make_config(**{field: value})
