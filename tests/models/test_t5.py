"""T5 against the golden file of Hugging Face's torch model, and its position buckets against a slow count."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opensora_jax.models.t5 import T5Config, T5Encoder, relative_position_buckets
from opensora_jax.weights.files import open_checkpoint
from opensora_jax.weights.rename import load_params

GOLDENS = Path(__file__).parents[1] / "goldens"
TOLERANCE = 2e-5  # of the largest value


@pytest.fixture(scope="module")
def golden():
    tensors = {key: np.asarray(value) for key, value in open_checkpoint(GOLDENS / "text_t5.safetensors").items()}
    return T5Config(**json.loads((GOLDENS / "text_t5.json").read_text())["config"]), tensors


def run(golden, dtype=jnp.float32):
    config, tensors = golden
    graphdef, params = nnx.split(nnx.eval_shape(lambda: T5Encoder(config, dtype=dtype, rngs=nnx.Rngs(0))))
    published = {key.removeprefix("param/"): v for key, v in tensors.items() if key.startswith("param/")}
    model = nnx.merge(graphdef, load_params("t5", published, params))
    with jax.default_matmul_precision("highest"):
        return model(jnp.asarray(tensors["in/input_ids"], jnp.int32))


def test_t5_equals_the_published_encoder(golden):
    expected = golden[1]["out/last_hidden_state"]
    assert np.abs(run(golden) - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_t5_attends_to_padding(golden):
    masked = golden[1]["out/with_attention_mask_NOT_used"]
    assert np.abs(run(golden)[:1] - masked).max() > 100 * TOLERANCE * np.abs(masked).max()


def test_t5_computes_in_the_dtype_it_is_given(golden):
    output, expected = run(golden, jnp.bfloat16), golden[1]["out/last_hidden_state"]
    assert output.dtype == jnp.bfloat16
    assert np.linalg.norm(output.astype(np.float32) - expected) < 0.05 * np.linalg.norm(expected)


def test_buckets_are_exact_nearby_and_logarithmic_far_away():
    buckets = relative_position_buckets(173, num_buckets=32, max_distance=128)
    for query, key in [(0, 0), (0, 5), (5, 0), (7, 20), (60, 43), (0, 90), (172, 1), (1, 172)]:
        distance = abs(key - query)
        coarse = 8 + math.floor(8 * math.log(max(distance, 8) / 8) / math.log(128 / 8))
        expected = (distance if distance < 8 else min(coarse, 15)) + 16 * (key > query)
        assert buckets[query, key] == expected


def test_t5_of_version_1_0_is_refused():
    with pytest.raises(ValueError, match="gated-gelu"):
        T5Config(vocab_size=7, d_model=2, d_kv=1, d_ff=3, num_layers=1, num_heads=2, feed_forward_proj="relu")
