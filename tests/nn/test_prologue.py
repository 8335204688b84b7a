"""The kernel that prepares queries and keys on TPUs, in a simulation, against the norm and the rotation."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu

from opensora_jax.kernels import prologue_tpu
from opensora_jax.nn import prologue
from opensora_jax.nn.norm import RMSNorm
from opensora_jax.nn.rope import rope_table, rotate_half, rotate_pairs
from opensora_jax.parallel.mesh import MeshConfig, make_mesh

CASES = {
    "halves, several blocks, odd length": (rotate_half, jnp.float32, (2, 301, 2, 128), False),
    "pairs, positions of their own": (rotate_pairs, jnp.float32, (2, 40, 3, 128), True),
    "halves of 256 in bfloat16": (rotate_half, jnp.bfloat16, (1, 130, 1, 256), False),
    "pairs in bfloat16": (rotate_pairs, jnp.bfloat16, (1, 130, 2, 128), False),
}


def prepared(rotate, dtype, shape, per_sample):
    """Returns values and gradients of what `normed_and_rotated` is."""
    B, L, _, K = shape
    x, gradient = (jax.random.normal(jax.random.key(i), shape, dtype) for i in range(2))
    ids = jax.random.randint(jax.random.key(2), (B if per_sample else 1, L, 3), 0, 50)
    table = rope_table(ids if per_sample else ids[0], (K // 2, K // 4, K // 4), 100.0)
    norm = RMSNorm(K, rngs=nnx.Rngs(0))
    norm.scale[...] = 1 + 0.3 * jax.random.normal(jax.random.key(3), (K,))
    graph, params = nnx.split(norm)

    def run(x, params):
        return prologue.normed_and_rotated(x, nnx.merge(graph, params), table, rotate)

    out, vjp = jax.vjp(run, x, params)
    return jax.tree.leaves((out, vjp(gradient)))


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_the_norm_and_the_rotation(name):
    rotate, dtype, *rest = CASES[name]
    expected = prepared(rotate, dtype, *rest)
    on_tpu = mock.patch.object(prologue, "platform", return_value="tpu")
    small = mock.patch.object(prologue_tpu, "BLOCK_BYTES", 128 * 1024)  # several blocks
    there = mock.patch.object(prologue_tpu, "forward", wraps=prologue_tpu.forward)
    back = mock.patch.object(prologue_tpu, "backward", wraps=prologue_tpu.backward)
    with on_tpu, small, there as forward, back as backward, pltpu.force_tpu_interpret_mode():
        found = prepared(rotate, dtype, *rest)
    assert (forward.call_count, backward.call_count) == (1, 1)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        difference = np.abs(np.float32(a) - np.float32(b)).max() / np.abs(np.float32(b)).max()
        assert difference < (2e-6 if dtype == jnp.float32 else 2e-2)  # XLA rounds once more on the way back


def test_devices_prepare_heads_of_their_own():
    case = rotate_half, jnp.float32, (2, 40, 4, 128), True
    expected = prepared(*case)
    on_tpu = mock.patch.object(prologue, "platform", return_value="tpu")
    called = mock.patch.object(prologue_tpu, "forward", wraps=prologue_tpu.forward)
    mesh = make_mesh(MeshConfig(1, 1, 1, 2), jax.devices()[:2])
    with on_tpu, called as kernel, pltpu.force_tpu_interpret_mode(), jax.set_mesh(mesh):
        found = jax.jit(prepared, static_argnums=(0, 1, 2, 3))(*case)
    assert kernel.call_args.args[0].shape == (2, 40, 2 * 128)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("channels", [64, 192])
def test_heads_that_are_no_whole_registers_do_without(channels):
    shape = (1, 9, 2, channels)
    with (
        mock.patch.object(prologue, "platform", return_value="tpu"),
        mock.patch.object(prologue_tpu, "forward") as kernel,
    ):
        prepared(rotate_half, jnp.float32, shape, False)
    assert not kernel.called
