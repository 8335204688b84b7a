"""A convolution in parts is the whole one, forwards and backwards, on any sizes."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opensora_jax.nn import convolve as module
from opensora_jax.nn.conv import Conv
from opensora_jax.nn.conv3d import CausalConv3d
from opensora_jax.nn.convolve import convolve


def draw(*shape, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
@pytest.mark.parametrize(
    ("images", "rows", "largest"),
    [
        (6, 5, 10**9),  # whole
        (6, 5, 2 * 5 * 7 * 9 * 3),  # several images at a time
        (5, 5, 2 * 5 * 7 * 9 * 3),  # a prime number of images
        (2, 11, 3 * 7 * 9 * 3),  # strips of rows, the last one short
        (2, 11, 1),  # single rows
    ],
)
@pytest.mark.parametrize("wide", [1, 9])  # as products of matrices, and not
def test_parts_make_the_whole(monkeypatch, images, rows, largest, strides, wide):
    monkeypatch.setattr(module, "DEEP", 1)
    monkeypatch.setattr(module, "WIDE", wide)
    monkeypatch.setattr(module, "LARGEST_PART", largest)
    monkeypatch.setattr(module, "LARGEST_PRODUCT", largest)
    x, kernel = draw(images, rows * strides[0] + 2, 7 * strides[1] + 2, 3, seed=0), draw(3, 3, 3, 2, seed=1)

    def measure(run):
        return jax.jit(jax.value_and_grad(lambda x, kernel: (run(x, kernel, strides) ** 2).sum(), argnums=(0, 1)))

    ours, whole = (jax.jit(run, static_argnums=2)(x, kernel, strides) for run in (convolve, module._whole))
    np.testing.assert_allclose(ours, whole, rtol=1e-5, atol=1e-5)
    found, expected = (measure(run)(x, kernel) for run in (convolve, module._whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_forms_of_other_platforms_are_those_of_cpus_forwards_and_backwards(dtype):
    x = draw(2, 5, 6, 8, 3, seed=0)
    for strides in ((1, 1, 1), (2, 2, 2)):
        causal = CausalConv3d(
            3, 4, strides=strides, kernel_init=nnx.initializers.normal(1.0), dtype=dtype, rngs=nnx.Rngs(0)
        )
        for layer in (causal, Conv(3, 4, (3, 3, 3), strides=strides, dtype=dtype, rngs=nnx.Rngs(0))):
            graph, params = nnx.split(layer)

            def loss(params, x, graph=graph):
                y = nnx.merge(graph, params)(x)
                assert y.dtype == dtype
                return jnp.sin(y.astype(jnp.float32)).sum()

            run = jax.value_and_grad(loss, argnums=(0, 1))
            ours, theirs = jax.jit(run)(params, x), jax.jit(as_elsewhere(run))(params, x)
            tolerance = 1e-5 if dtype == jnp.float32 else 0.05
            for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
                np.testing.assert_allclose(a, b, atol=tolerance * float(jnp.abs(b).max()))


def as_elsewhere(function):
    """Returns the function with what other platforms than a CPU compute."""

    def run(*arrays):
        with mock.patch.object(jax.lax, "platform_dependent", lambda *arrays, cpu, default: default(*arrays)):
            return function(*arrays)

    return run
