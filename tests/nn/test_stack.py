import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opensora_jax.nn.linear import Linear
from opensora_jax.nn.stack import POLICIES, Stack
from opensora_jax.parallel.sequence import attend


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


class Attention(nnx.Module):
    def __init__(self, *, rngs):
        self.linear = Linear(6, 6, rngs=rngs)

    def __call__(self, x):
        heads = jnp.sin(self.linear(x)).reshape(2, 5, 3, 2)
        return x + jnp.tanh(attend(heads, heads, heads, None).reshape(x.shape))


def gradient_of(remat, policy):
    """Returns the gradients of a stack's parameters, the program before compiling, and as JAX sees it."""
    stack = Stack(lambda rngs: Attention(rngs=rngs), 3, remat=remat, policy=policy, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(stack)
    x = jax.random.normal(jax.random.key(1), (2, 5, 6))
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(nnx.merge(graphdef, params)(x) ** 2)))
    return gradient(params), gradient.lower(params).as_text(), str(jax.make_jaxpr(gradient)(params))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("remat", [2, 3])
def test_what_is_kept_changes_no_gradient(remat, policy):
    expected, *_ = gradient_of(0, "full")
    found, *_ = gradient_of(remat, policy)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, expected)


def test_kept_attention_is_not_computed_again():
    products = {policy: gradient_of(3, policy)[1].count("stablehlo.dot_general") for policy in POLICIES}
    assert products["save_attention"] == products["offload"] == products["full"] - 1


def test_offloaded_attention_and_inputs_of_blocks_wait_in_the_hosts_memory():
    waiting = {policy: set(re.findall(r"f32<host>\[3,([\d,]+)\]", gradient_of(3, policy)[2])) for policy in POLICIES}
    assert waiting == {"full": set(), "save_attention": set(), "offload": {"2,5,6", "2,5,3,2"}}
