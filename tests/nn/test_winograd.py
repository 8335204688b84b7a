import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opensora_jax.nn import winograd
from opensora_jax.nn.conv3d import Conv3d


def inputs(frames: int, height: int, width: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, frames, height + 2, width + 2, 3)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(rng.standard_normal((3, 3, 3, 3, 5)).astype(np.float32))


def definition(x: jax.Array, kernel: jax.Array) -> jax.Array:
    padded = jnp.concatenate([x[:, :1], x[:, :1], x], axis=1)
    return jax.lax.conv_general_dilated(
        padded, kernel, (1, 1, 1), "VALID", dimension_numbers=("NDHWC", "DHWIO", "NDHWC"), precision="highest"
    )


@pytest.mark.parametrize(("height", "width", "strip"), [(4, 6, 2**17), (7, 5, 2**17), (11, 5, 40)])
def test_it_is_the_causal_convolution_for_even_and_odd_sizes_and_in_strips(monkeypatch, height, width, strip):
    monkeypatch.setattr(winograd, "LARGEST_STRIP", strip)
    x, kernel = inputs(4, height, width)
    found, expected = winograd.convolve_causal(x, kernel), definition(x, kernel)
    assert found.shape == expected.shape == (2, 4, height, width, 5)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_a_layer_that_uses_it_gives_the_same_gradients(monkeypatch):
    x, kernel = inputs(3, 5, 4)
    graph, params = nnx.split(Conv3d(3, 5, 3, dtype=jnp.float32, rngs=nnx.Rngs(0)))

    @jax.jit
    def loss(x, kernel):
        layer = nnx.merge(graph, nnx.map_state(lambda path, leaf: kernel if "kernel" in path else leaf, params))
        return jnp.sin(layer(x)).sum()

    plain = jax.value_and_grad(loss, argnums=(0, 1))(x, kernel)
    monkeypatch.setattr(winograd, "is_faster", lambda *shapes: True)
    loss.clear_cache()
    for found, expected in zip(
        jax.tree.leaves(jax.value_and_grad(loss, argnums=(0, 1))(x, kernel)), jax.tree.leaves(plain), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_it_is_for_large_convolutions_of_many_channels_without_strides():
    wide = (3, 3, 3, 128, 128)
    assert winograd.is_faster((1, 9, 66, 66, 128), wide, (1, 1, 1))
    assert not winograd.is_faster((1, 9, 66, 66, 128), wide, (1, 2, 2))
    assert not winograd.is_faster((1, 3, 10, 10, 128), wide, (1, 1, 1))
    assert not winograd.is_faster((1, 9, 66, 66, 3), (3, 3, 3, 3, 128), (1, 1, 1))
    assert not winograd.is_faster((1, 9, 66, 66, 128), (1, 3, 3, 128, 128), (1, 1, 1))
