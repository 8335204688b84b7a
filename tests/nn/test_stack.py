import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opensora_jax.nn.linear import Linear
from opensora_jax.nn.stack import Stack


class Block(nnx.Module):
    def __init__(self, *, rngs):
        self.linear = Linear(5, 5, rngs=rngs)

    def __call__(self, x, shift):
        return x + jnp.tanh(self.linear(x)) + shift


@pytest.mark.parametrize("remat", [0, 2, 100])
def test_stack_is_the_same_as_a_loop(remat):
    stack = Stack(lambda rngs: Block(rngs=rngs), 3, remat=remat, rngs=nnx.Rngs(0))
    x, shift = jnp.arange(10.0).reshape(2, 5) / 10, jnp.ones(5)
    graphdef, layers = nnx.split(stack.blocks)

    def loop(layers, x):
        for index in range(3):
            x = nnx.merge(graphdef, jax.tree.map(lambda leaf, i=index: leaf[i], layers))(x, shift)
        return x

    np.testing.assert_allclose(stack(x, shift), loop(layers, x), rtol=1e-6)
    scanned = jax.grad(lambda x: stack(x, shift).sum())(x)
    np.testing.assert_allclose(scanned, jax.grad(lambda x: loop(layers, x).sum())(x), rtol=1e-5)


def test_layers_start_from_different_weights():
    kernel = Stack(lambda rngs: Block(rngs=rngs), 3, rngs=nnx.Rngs(0)).blocks.linear.kernel[...]
    assert kernel.shape == (3, 5, 5)
    assert not np.allclose(kernel[0], kernel[1])
