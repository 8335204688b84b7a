"""What goldens do not say of T5 (tests/parity has those): its dtype, and its buckets against a slow count."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opensora_jax.models.t5 import T5Config, T5Encoder, relative_position_buckets

CONFIG = T5Config(vocab_size=23, d_model=24, d_kv=5, d_ff=31, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu")


def test_t5_computes_in_the_dtype_it_is_given():
    ids, params = jnp.arange(34).reshape(2, 17) % 23, nnx.state(T5Encoder(CONFIG, rngs=nnx.Rngs(0)))

    def run(dtype):
        graphdef, _ = nnx.split(nnx.eval_shape(lambda: T5Encoder(CONFIG, dtype=dtype, rngs=nnx.Rngs(0))))
        return jax.jit(lambda params: nnx.merge(graphdef, params)(ids))(params)

    exact, output = run(jnp.float32), run(jnp.bfloat16)
    assert output.dtype == jnp.bfloat16
    assert np.linalg.norm(output.astype(np.float32) - exact) < 0.05 * np.linalg.norm(exact)


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
