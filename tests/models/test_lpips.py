"""What goldens do not say of the perceptual distance (tests/parity has those)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opensora_jax.models.lpips import LPIPS, LPIPSConfig

SMALL = LPIPSConfig((3, 4, 5, 6, 7))


def test_frames_without_features_are_alike_and_have_a_finite_gradient():
    model = LPIPS(SMALL, rngs=nnx.Rngs(0))
    a = jax.random.uniform(jax.random.key(0), (2, 3, 17, 19, 3), minval=-1)
    dark = model.net.slice1["2"].kernel
    dark[...] = -jnp.abs(dark[...])  # no feature of this layer is above 0: vectors without a direction

    def total(b):
        distances = model(a, b)
        return distances.sum(), distances

    gradient, distances = jax.jit(jax.grad(total, has_aux=True))(-a)
    assert distances.shape == (2, 3)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(distances, 0)  # nothing is seen


def test_frames_that_vanish_on_the_way_are_refused():
    model = nnx.eval_shape(lambda: LPIPS(SMALL, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="16x16 or more: got 15x32"):
        model(jnp.zeros((1, 1, 15, 32, 3)), jnp.zeros((1, 1, 15, 32, 3)))


def test_a_network_of_another_depth_is_refused():
    with pytest.raises(ValueError, match="5 numbers, one a stage: got 2"):
        LPIPSConfig((64, 128))
