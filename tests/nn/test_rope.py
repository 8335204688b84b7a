import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.nn.embed import grid_ids, patchify, timestep_embedding, unpatchify
from opensora_jax.nn.rope import rope_table, rotate_half, rotate_pairs


@pytest.mark.parametrize("rotate", [rotate_half, rotate_pairs])
def test_products_of_turned_vectors_depend_on_the_distance_alone(rotate):
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 3, 12))

    def product(at, other):
        tables = [rope_table(jnp.asarray([p]), (4, 4, 4), 100.0) for p in (at, other)]
        return jnp.einsum("BLNK,BLNK->BLN", rotate(q, tables[0]), rotate(k, tables[1]))

    near, far = product((1, 2, 3), (2, 5, 3)), product((7, 0, 11), (8, 3, 11))
    np.testing.assert_allclose(near, far, rtol=2e-5)
    assert not np.allclose(near, product((1, 2, 3), (3, 5, 3)))


def test_both_layouts_turn_the_same_pairs_under_a_permutation():
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 12))
    table = rope_table(jnp.arange(15).reshape(5, 3), (4, 4, 4), 100.0)
    order = np.arange(12).reshape(6, 2).T.reshape(-1)  # 0 2 4 .. 1 3 5 ..
    np.testing.assert_allclose(rotate_pairs(x, table)[..., order], rotate_half(x[..., order], table), rtol=1e-6)


def test_tokens_of_a_latent_go_back_to_it():
    x = jnp.arange(2 * 3 * 4 * 6 * 5.0).reshape(2, 3, 4, 6, 5)
    tokens = patchify(x, 2)
    assert tokens.shape == (2, 3 * 2 * 3, 5 * 4)
    np.testing.assert_array_equal(tokens[0, 1, :4], x[0, 0, :2, 2:4, 0].reshape(-1))  # (c ph pw), second column
    np.testing.assert_array_equal(unpatchify(tokens, (3, 2, 3), 2), x)


def test_positions_count_in_token_order():
    assert grid_ids((2, 1, 3)).tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [1, 0, 0], [1, 0, 1], [1, 0, 2]]


def test_times_are_multiplied_by_1000_in_their_own_dtype():
    t = jnp.asarray([0.3712], jnp.bfloat16)
    rounded = (t * 1000).astype(jnp.float32) / 1000
    np.testing.assert_array_equal(timestep_embedding(t, 8), timestep_embedding(rounded, 8).astype(jnp.bfloat16))
    assert not np.array_equal(timestep_embedding(t, 8), timestep_embedding(t.astype(jnp.float32), 8))
