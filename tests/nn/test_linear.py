"""A gated product: the same gradients, and one product less for blocks that make their activations again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opensora_jax.forecast.count import count
from opensora_jax.nn import linear
from opensora_jax.nn.linear import Linear
from opensora_jax.nn.stack import Stack
from opensora_jax.parallel.mesh import MeshConfig, make_mesh


def gradients(module, x, gate, weights):
    """Returns the value of a weighted sum of the gated result, and its gradients."""
    graph, params = nnx.split(module)

    def measure(params, x, gate):
        return (weights * jnp.float32(nnx.merge(graph, params).gated([x], gate))).sum()

    return jax.tree.leaves(jax.jit(jax.value_and_grad(measure, argnums=(0, 1, 2)))(params, x, gate))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_long_sample_has_the_gradients_of_a_short_one(monkeypatch, dtype, bias):
    module = Linear(6, 5, bias=bias, dtype=dtype, rngs=nnx.Rngs(0))
    if bias:
        module.bias[...] = jnp.arange(5.0)
    x, gate, weights = (
        jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate([(3, 7, 6), (3, 1, 5), (3, 7, 5)])
    )
    expected = gradients(module, x, gate, weights)
    monkeypatch.setattr(linear, "MANY_ROWS", 7)
    found = gradients(module, x, gate, weights)
    assert len(found) == (5 if bias else 4)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        scale = float(jnp.abs(other).max())
        np.testing.assert_allclose(
            np.float32(one), np.float32(other), atol=(1e-6 if dtype == jnp.float32 else 0.02) * scale
        )


@pytest.mark.parametrize("bias", [True, False])
def test_parts_are_products_of_their_own_where_devices_split_columns(bias):
    layer = Linear(8, 12, bias=bias, rngs=nnx.Rngs(0))
    if bias:
        layer.bias[...] = jnp.arange(12.0)
    x = jax.random.normal(jax.random.key(0), (2, 3, 8))
    expected = layer(x)
    graph, params = nnx.split(layer)
    with jax.set_mesh(make_mesh(MeshConfig(1, 1, 1, 2), jax.devices()[:2])):
        parts = jax.jit(lambda params, x: nnx.merge(graph, params).split(x, [4, 6]))(params, x)
        joined = jax.jit(lambda params, x: nnx.merge(graph, params).joined([x[..., :2], x[..., 2:]]))(params, x)
    assert [part.shape[-1] for part in parts] == [4, 2, 6]
    np.testing.assert_allclose(np.concatenate(parts, -1), expected, atol=1e-6)
    np.testing.assert_allclose(joined, expected, atol=1e-6)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.first, self.last = Linear(4, 6, rngs=rngs), Linear(6, 4, rngs=rngs)

    def __call__(self, x, gate):
        return x + self.last.gated([jnp.tanh(self.first(x))], gate)


@pytest.mark.parametrize(("rows", "products"), [(1, 7), (99, 8)])
def test_a_block_that_recomputes_leaves_the_last_product_out(monkeypatch, rows, products):
    """Each of the two runs forwards and has two gradients; the first runs again, the last too where rows are few."""
    monkeypatch.setattr(linear, "MANY_ROWS", rows)
    graph, params = nnx.split(Stack(Block, 3, remat=3, rngs=nnx.Rngs(0)))

    def measure(params, x, gate):
        return jnp.square(nnx.merge(graph, params)(x, gate)).sum()

    x, gate = jnp.ones((2, 9, 4)), jnp.ones((2, 1, 4))
    traced = jax.jit(jax.grad(measure, argnums=(0, 1, 2))).trace(params, x, gate)
    assert count(traced.jaxpr.jaxpr, "cpu").flops == products * 3 * 2 * (2 * 9 * 4 * 6)
