"""What goldens do not say of the temporal autoencoder: its convolution, and the frames that it needs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opensora_jax.models.temporal_vae import TemporalVAEConfig, ZeroCausalConv3d


@pytest.mark.parametrize(("size", "stride", "zeros"), [(3, 1, 2), (3, 2, 1), (1, 1, 0)])
@pytest.mark.parametrize("frames", [1, 2, 7])
def test_taps_of_2d_convolutions_are_the_3d_convolution_with_zeros_before_the_beginning(size, stride, zeros, frames):
    conv = ZeroCausalConv3d(2, 5, size, stride=stride, dtype=jnp.float32, rngs=nnx.Rngs(0))
    conv.conv.kernel[...] = jax.random.normal(jax.random.key(2), conv.conv.kernel.shape)
    conv.conv.bias[...] = jnp.arange(5.0)
    x = jax.random.normal(jax.random.key(1), (2, frames, 3, 7, 2))
    border = (size // 2, size // 2)
    whole = jax.lax.conv_general_dilated(
        x,
        conv.conv.kernel[...],
        (stride, 1, 1),
        ((zeros, 0), border, border),
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )
    if whole.shape[1]:
        np.testing.assert_allclose(conv(x), whole + jnp.arange(5.0), atol=1e-4)


@pytest.mark.parametrize(
    ("downsample", "filters", "message"),
    [
        ((True,), 4, "one value less than the 3 of channel_multipliers: got 1"),
        ((True, False), 5, "filters is divisible by num_groups, 2: got 5"),
    ],
)
def test_a_config_that_no_network_has_is_refused(downsample, filters, message):
    with pytest.raises(ValueError, match=message):
        TemporalVAEConfig(4, 4, 4, filters, 1, (1, 2, 2), downsample, 2)
