"""LoRA beside linear layers: nothing at the start, W + alpha / r A B later, in scanned stacks too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opensora_jax.nn.linear import Linear
from opensora_jax.nn.lora import LoRAConfig, add_lora, all_but_lora, is_lora, linear_layers, merge_lora
from opensora_jax.nn.stack import Stack

PATHS = {("first",), ("blocks", "blocks", "inner", "up"), ("tail", 1)}


class Block(nnx.Module):
    def __init__(self, *, rngs):
        self.inner = nnx.Module()
        self.inner.up = Linear(5, 7, ("embed", "mlp"), rngs=rngs)
        self.inner.down = Linear(7, 5, ("mlp", "embed"), rngs=rngs)

    def __call__(self, x):
        return x + self.inner.down(jnp.tanh(self.inner.up(x)))


class Model(nnx.Module):
    def __init__(self, rngs, dtype=jnp.float32):
        self.first = Linear(3, 5, (None, "embed"), dtype=dtype, rngs=rngs)
        self.blocks = Stack(lambda rngs: Block(rngs=rngs), 3, remat=2, rngs=rngs)
        self.tail = nnx.List([Linear(5, 5, rngs=rngs), Linear(5, 2, rngs=rngs)])

    def __call__(self, x):
        x = self.blocks(self.first(x))
        for layer in self.tail:
            x = layer(x)
        return x


def adapted(rank=2, alpha=3.0, paths=PATHS):
    model = Model(nnx.Rngs(0))
    add_lora(model, paths, rank, alpha, rngs=nnx.Rngs(1))
    return model


def trained(model):
    """Returns the parameters with other values in every LoRA."""
    graphdef, params = nnx.split(model)
    keys = iter(jax.random.split(jax.random.key(5), 20))
    flat = [
        (path, leaf.replace(jax.random.normal(next(keys), leaf.shape)) if is_lora(path) else leaf)
        for path, leaf in nnx.to_flat_state(params)
    ]
    return graphdef, nnx.from_flat_state(flat)


X = jax.random.normal(jax.random.key(2), (4, 3))


def test_a_new_lora_changes_nothing():
    np.testing.assert_array_equal(adapted()(X), Model(nnx.Rngs(0))(X))


def test_all_linear_layers_are_found_with_their_kernels():
    assert linear_layers(nnx.eval_shape(lambda: Model(nnx.Rngs(0)))) == {
        ("first",): (3, 5),
        ("blocks", "blocks", "inner", "up"): (3, 5, 7),
        ("blocks", "blocks", "inner", "down"): (3, 7, 5),
        ("tail", 0): (5, 5),
        ("tail", 1): (5, 2),
    }


def test_other_parameters_keep_their_paths_and_values():
    plain, ours = (dict(nnx.to_flat_state(nnx.state(model))) for model in (Model(nnx.Rngs(0)), adapted()))
    assert plain.keys() == all_but_lora(nnx.state(adapted()))
    for path, leaf in plain.items():
        np.testing.assert_array_equal(ours[path][...], leaf[...])
    assert {path[:-2] for path in ours if is_lora(path)} == PATHS


def test_the_matrices_are_thin_stacked_and_state_their_axes():
    lora = adapted().blocks.blocks.inner.up
    assert (lora.lora_A.kernel.shape, lora.lora_B.kernel.shape) == ((3, 5, 2), (3, 2, 7))
    assert lora.lora_A.kernel.get_metadata()["axes"] == ("embed", None)
    assert lora.lora_B.kernel.get_metadata()["axes"] == (None, "mlp")
    assert not lora.lora_B.kernel[...].any()
    first, second = lora.lora_A.kernel[0], lora.lora_A.kernel[1]
    assert not np.allclose(first, second)
    assert 0.3 < np.abs(lora.lora_A.kernel[...]).max() <= 1 / np.sqrt(5)  # PEFT: uniform up to 1 / sqrt(in)


def test_merged_weights_compute_the_same():
    graphdef, params = trained(adapted(rank=2, alpha=3.0))
    merged = merge_lora(params, 3.0)
    plain = Model(nnx.Rngs(0))
    assert nnx.to_flat_state(merged).paths == nnx.to_flat_state(nnx.state(plain)).paths
    expected = nnx.merge(graphdef, params)(X)
    np.testing.assert_allclose(nnx.merge(nnx.graphdef(plain), merged)(X), expected, rtol=2e-5, atol=1e-5)
    assert not np.allclose(plain(X), expected, atol=0.1)
    up = params["blocks"]["blocks"]["inner"]["up"]
    by_hand = up["kernel"][1] + 3.0 / 2 * up["lora_A"]["kernel"][1] @ up["lora_B"]["kernel"][1]
    np.testing.assert_allclose(merged["blocks"]["blocks"]["inner"]["up"]["kernel"][1], by_hand, rtol=1e-5, atol=1e-6)


def test_kernels_are_merged_in_their_own_dtype():
    _, params = trained(adapted())
    halves = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(merge_lora(halves, 1.0))} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    ("changes", "complaint"), [({"rank": 0}, "rank is at least 1"), ({"targets": ()}, "targets is empty")]
)
def test_a_lora_of_nothing_is_refused(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        LoRAConfig(**{"rank": 2, "alpha": 2.0, "targets": ("first",), "from_pretrained": None} | changes)
