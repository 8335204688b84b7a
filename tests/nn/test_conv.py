"""The convolution with zero borders against XLA's own 3D convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opensora_jax.nn.conv import Conv


def reference(x, kernel, strides):
    borders = [(size // 2, size // 2) for size in kernel.shape[:3]]
    numbers = ("NDHWC", "DHWIO", "NDHWC")
    return jax.lax.conv_general_dilated(x, kernel, strides, borders, dimension_numbers=numbers)


def clip(frames, channels):
    return jax.random.normal(jax.random.key(frames), (2, frames, 5, 7, channels))


@pytest.mark.parametrize("strides", [(1, 1, 1), (1, 2, 2), (2, 2, 2), (3, 1, 2)])
@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_taps_of_time_add_up_to_the_convolution(frames, strides):
    x, conv = clip(frames, 3), Conv(3, 4, (5, 3, 3), strides=strides, dtype=jnp.float32, rngs=nnx.Rngs(0))
    conv.bias[...] = jnp.arange(4.0)
    expected = reference(x, conv.kernel[...], strides) + jnp.arange(4.0)
    np.testing.assert_allclose(conv(x), expected, atol=1e-5)


@pytest.mark.parametrize("frames", [2, 4])
def test_many_channels_see_no_frames_that_are_not_there(frames):
    """Of two frames and every second one the tap before sees none: parts of no image cannot be made."""
    conv = nnx.eval_shape(lambda: Conv(512, 8, (3, 3, 3), strides=(2, 2, 2), dtype=jnp.float32, rngs=nnx.Rngs(0)))
    seen = nnx.eval_shape(lambda conv, x: conv(x), conv, jax.ShapeDtypeStruct((1, frames, 4, 4, 512), jnp.float32))
    assert seen.shape == (1, frames // 2, 2, 2, 8)


def test_a_kernel_without_time_sees_every_frame_alone():
    x, conv = clip(3, 2), Conv(2, 5, (3, 3), strides=(1, 2, 2), bias=False, dtype=jnp.float32, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(conv(x), reference(x, conv.kernel[...][None], (1, 2, 2)), atol=1e-5)


def test_in_bfloat16_the_sum_over_taps_is_rounded_once():
    x, conv = jnp.ones((1, 3, 3, 3, 3)), Conv(3, 1, (3, 3, 3), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    conv.kernel[...] = jnp.full(conv.kernel.shape, 1 + 1 / 128)
    assert conv(x).dtype == jnp.bfloat16
    assert conv(x)[0, 1, 1, 1, 0] == jnp.bfloat16(3 * 9 * 3 * (1 + 1 / 128))
