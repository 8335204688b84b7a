import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opensora_jax.nn.conv3d import CausalConv3d


@pytest.mark.parametrize("frames", [1, 6, 7])
@pytest.mark.parametrize("strides", [(1, 1, 1), (2, 2, 2), (1, 2, 2), (2, 1, 1), (3, 1, 1)])
def test_taps_of_2d_convolutions_are_the_padded_3d_convolution(strides, frames):
    init = nnx.initializers.normal(1.0)
    conv = CausalConv3d(2, 5, strides=strides, kernel_init=init, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, frames, 9, 11, 2))
    padded = jnp.pad(x, ((0, 0), (2, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    whole = jax.lax.conv_general_dilated(
        padded, conv.conv.kernel[...], strides, "VALID", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )
    np.testing.assert_allclose(conv(x), whole, atol=1e-4)


def test_the_future_has_no_influence():
    conv = CausalConv3d(3, 4, kernel_init=nnx.initializers.normal(1.0), dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, 5, 4, 6, 3))
    changed = x.at[:, 3:].set(7.0)
    np.testing.assert_array_equal(conv(x)[:, :3], conv(changed)[:, :3])
    assert not np.allclose(conv(x)[:, 3:], conv(changed)[:, 3:])


def test_a_fresh_convolution_sees_one_frame():
    conv = CausalConv3d(3, 4, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, 5, 4, 6, 3))
    single = jnp.concatenate([conv(x[:, t : t + 1]) for t in range(5)], axis=1)
    np.testing.assert_allclose(conv(x), single, atol=1e-6)
