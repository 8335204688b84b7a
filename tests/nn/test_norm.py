import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opensora_jax.nn.norm import BatchNorm, GroupNorm, LayerNorm, RMSNorm

X = jax.random.normal(jax.random.key(0), (2, 3, 5, 6)) * 3 + 1


def test_rms_norm_divides_by_the_root_mean_square():
    norm = RMSNorm(6, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(norm(X), X / np.sqrt((np.asarray(X) ** 2).mean(-1, keepdims=True) + 1e-6), rtol=1e-5)


def test_rms_norm_rounds_before_the_gain():
    norm = RMSNorm(6, rngs=nnx.Rngs(0))
    norm.scale[...] = jnp.full(6, 1.01)
    x = X.astype(jnp.bfloat16)
    unit = RMSNorm(6, rngs=nnx.Rngs(0))(x)
    np.testing.assert_array_equal(norm(x), unit * jnp.bfloat16(1.01))


def test_group_norm_takes_its_statistics_over_all_positions():
    y = np.asarray(GroupNorm(2, 6, rngs=nnx.Rngs(0))(X)).reshape(2, 15, 2, 3)
    np.testing.assert_allclose(y.mean((1, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(y.std((1, 3)), 1, atol=1e-5)


def test_layer_norm_has_gain_and_bias():
    norm = LayerNorm(6, rngs=nnx.Rngs(0))
    norm.scale[...], norm.bias[...] = jnp.full(6, 2.0), jnp.full(6, 3.0)
    y = np.asarray(norm(X))
    np.testing.assert_allclose(y.mean(-1), 3, atol=1e-5)
    np.testing.assert_allclose(y.std(-1), 2, atol=1e-4)


def test_batch_norm_forgets_a_tenth_of_its_statistics_a_batch():
    norm = BatchNorm(6, rngs=nnx.Rngs(0))
    y, after = norm.of_batch(X)
    flat = np.asarray(X).reshape(-1, 6)
    np.testing.assert_allclose(np.asarray(y).reshape(-1, 6), (flat - flat.mean(0)) / flat.std(0), atol=1e-4)
    np.testing.assert_allclose(after["running_mean"], 0.1 * flat.mean(0), rtol=1e-5)
    np.testing.assert_allclose(after["running_var"], 0.9 + 0.1 * flat.var(0, ddof=1), rtol=1e-5)
    np.testing.assert_allclose(norm(X), X, rtol=1e-4)  # the module has the statistics that it started with


def test_batch_norm_of_one_position_is_refused():
    with pytest.raises(ValueError, match="two positions"):
        BatchNorm(6, rngs=nnx.Rngs(0)).of_batch(X[:1, :1, :1])
