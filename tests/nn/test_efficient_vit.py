"""Linear attention against its definition."""

import jax
import jax.numpy as jnp
import numpy as np

from opensora_jax.nn.efficient_vit import linear_attention


def tokens(seed, size):
    return jax.random.normal(jax.random.key(seed), (2, 3, 2, 5, 7, size))


def test_linear_attention_weighs_all_positions_by_products_of_positive_parts():
    q, k, v = jnp.abs(tokens(0, 11)), tokens(1, 11), tokens(2, 13)  # so that no weights are all zero
    flat = [np.asarray(a, np.float64).reshape(2, 30, 7, -1) for a in (q, k, v)]
    scores = np.einsum("bqnk,blnk->bnql", np.maximum(flat[0], 0), np.maximum(flat[1], 0))
    expected = np.einsum("bnql,blnv->bqnv", scores / scores.sum(-1, keepdims=True), flat[2])
    np.testing.assert_allclose(linear_attention(q, k, v).reshape(2, 30, 7, 13), expected, atol=1e-5)


def test_a_query_without_positive_parts_gets_zero():
    q, k, v = -jnp.abs(tokens(0, 4)), tokens(1, 4), tokens(2, 4)
    assert not linear_attention(q, k, v).any()
