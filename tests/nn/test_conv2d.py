import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opensora_jax.nn.conv2d import Conv2d


@pytest.mark.parametrize(("size", "stride", "zeros"), [(3, 1, (1, 1)), (3, 2, (0, 1)), (1, 1, (0, 0)), (5, 1, (2, 2))])
def test_zeros_lie_around_an_image_and_before_a_halving_only_below_and_right(size, stride, zeros):
    init = nnx.initializers.normal(1.0)
    conv = Conv2d(2, 5, size, stride=stride, kernel_init=init, dtype=jnp.float32, rngs=nnx.Rngs(0))
    conv.bias[...] = jnp.arange(5.0)
    x = np.asarray(jax.random.normal(jax.random.key(1), (3, 6, 14, 2)))
    padded = np.pad(x, ((0, 0), zeros, zeros, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), (1, 2))[:, ::stride, ::stride]
    expected = np.einsum("NHWChw,hwCD->NHWD", windows, conv.kernel[...]) + np.arange(5)
    assert expected.shape == (3, 6 // stride, 14 // stride, 5)
    np.testing.assert_allclose(conv(jnp.asarray(x)), expected, atol=1e-4)


def test_a_fresh_convolution_keeps_lengths():
    conv = Conv2d(3, 7, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, 5, 4, 3))
    lengths = [np.linalg.norm(a, axis=-1) for a in (x, conv(x))]
    np.testing.assert_allclose(lengths[1], lengths[0] * (7 / 3) ** 0.5, rtol=1e-5)


def test_bfloat16_stays_bfloat16_and_parameters_do_not():
    conv = Conv2d(3, 7, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = jnp.ones((1, 4, 4, 3))
    graphdef, params = nnx.split(conv)
    gradient = jax.grad(lambda params: nnx.merge(graphdef, params)(x).astype(jnp.float32).sum())(params)
    assert conv(x).dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
