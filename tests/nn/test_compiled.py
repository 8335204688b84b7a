"""Compiled methods: one program for one network and one shape, outside and inside other programs."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from opensora_jax.nn.compiled import compiled

traces = []


class Scale(nnx.Module):
    """A factor and an optional summand."""

    def __init__(self, factor):
        self.factor = nnx.Param(jnp.float32(factor))

    @compiled
    def scale(self, x, summand=None):
        """Returns x times the factor."""
        traces.append(x.shape)
        return x * self.factor[...] + (0.0 if summand is None else summand)


def test_a_method_compiles_once_for_each_shape_and_network():
    traces.clear()
    model, other = Scale(2.0), Scale(3.0)
    for size in (3, 5, 3):
        np.testing.assert_array_equal(model.scale(jnp.ones(size)), np.full(size, 2.0))
        np.testing.assert_array_equal(other.scale(jnp.ones(size)), np.full(size, 3.0))
    assert traces == [(3,), (5,)]
    np.testing.assert_array_equal(model.scale(jnp.ones(3), jnp.float32(5.0)), np.full(3, 7.0))


def test_a_method_can_be_differentiated_inside_another_program():
    graph, params = nnx.split(Scale(2.0))
    grads = jax.jit(jax.grad(lambda params: nnx.merge(graph, params).scale(jnp.arange(4.0)).sum()))(params)
    assert grads["factor"][...] == 6.0


def test_a_method_keeps_its_name_and_docstring():
    assert Scale.scale.__name__ == "scale"
    assert Scale.scale.__doc__ == "Returns x times the factor."
