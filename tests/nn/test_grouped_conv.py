"""Convolutions within groups of channels against XLA's own 3D convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opensora_jax.nn.grouped_conv import DepthwiseConv, GroupedPointConv


def reference(x, kernel, groups):
    borders = [(size // 2, size // 2) for size in kernel.shape[:3]]
    return jax.lax.conv_general_dilated(
        *(x, kernel, (1, 1, 1), borders),
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        feature_group_count=groups,
    )


def clip(frames, channels):
    return jax.random.normal(jax.random.key(frames), (2, frames, 5, 7, channels))


@pytest.mark.parametrize("size", [(5, 5, 5), (3, 1, 3), (3, 5)])
@pytest.mark.parametrize("frames", [1, 2, 4])
def test_a_depthwise_convolution_is_one_with_a_group_a_channel(frames, size):
    x, conv = clip(frames, 6), DepthwiseConv(6, size, dtype=jnp.float32, rngs=nnx.Rngs(0))
    conv.bias[...] = jnp.arange(6.0)
    kernel = conv.kernel[...].reshape(*(1,) * (3 - len(size)), *size, 1, 6)
    np.testing.assert_allclose(conv(x), reference(x, kernel, 6) + jnp.arange(6.0), atol=1e-5)


@pytest.mark.parametrize("rank", [2, 3])
def test_a_grouped_point_convolution_mixes_within_groups(rank):
    x, conv = clip(3, 6), GroupedPointConv(6, 3, rank, dtype=jnp.float32, rngs=nnx.Rngs(0))
    assert conv.kernel.shape == (*[1] * rank, 2, 6)
    expected = reference(x, conv.kernel[...].reshape(1, 1, 1, 2, 6), 3)
    np.testing.assert_allclose(conv(x), expected, atol=1e-5)
