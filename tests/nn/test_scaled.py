"""Products with a shared factor, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.nn.scaled import scaled


@pytest.mark.parametrize("shape", [(2, 1, 8), (2, 5, 1), (1, 1, 8), (2, 5, 8), (1, 1, 1)])
def test_results_and_gradients_are_those_of_a_product(shape):
    keys = jax.random.split(jax.random.key(0), 3)
    x, weight = (jax.random.normal(key, (2, 5, 8)) for key in keys[:2])
    by = jax.random.normal(keys[2], shape)

    def gradients(product):
        return jax.value_and_grad(lambda x, by: (weight * product(x, by)).sum(), argnums=(0, 1))(x, by)

    jax.tree.map(
        lambda ours, plain: np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5),
        gradients(scaled),
        gradients(jnp.multiply),
    )


def test_an_axis_of_length_one_is_no_sum():
    x, by = jnp.full((1, 3), 2.0), jnp.full((1, 3), 5.0)
    np.testing.assert_array_equal(jax.grad(lambda by: scaled(x, by).sum())(by), x)


def test_gradients_keep_dtypes_and_sum_in_float32():
    x, by = jnp.full((1, 4096, 2), 1.0, jnp.bfloat16), jnp.ones((1, 1, 2), jnp.bfloat16)
    of_x, of_by = jax.grad(lambda x, by: scaled(x, by).astype(jnp.float32).sum(), argnums=(0, 1))(x, by)
    assert of_x.dtype == of_by.dtype == jnp.bfloat16
    np.testing.assert_array_equal(of_by.astype(jnp.float32), 4096.0)  # bfloat16 alone stops at 256
