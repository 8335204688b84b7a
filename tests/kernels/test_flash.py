"""Every backend against the reference: the Pallas kernels in a simulation of the TPU's memories, XLA in chunks.

Tolerances: float32 1e-5 of the largest value, bfloat16 1e-2; these backends sum in float32 but in another order.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from opensora_jax.kernels import chunked, flash_tpu, reference
from opensora_jax.kernels.blocks import Blocks, fit, largest

TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2}


def inputs(B, L, S, N, K, dtype):
    """Returns queries, keys, values and a gradient of the output."""
    return [jax.random.normal(jax.random.key(i), (B, length, N, K), dtype) for i, length in enumerate((L, S, S, L))]


def definition(q, k, v, real, gradient, scale):
    """Returns the output, the logsumexp of logits, and the gradients, by the reference in float32."""
    mask = None if real is None else real[:, None, None]
    q, k, v, gradient = (x.astype(jnp.float32) for x in (q, k, v, gradient))
    out, vjp = jax.vjp(lambda *x: reference.attention(*x, mask=mask, scale=scale), q, k, v)
    logits = jnp.einsum("BLNK,BSNK->BNLS", q, k) * scale
    return out, jax.nn.logsumexp(logits, -1, where=mask), *vjp(gradient)


def compare(module, size, real, dtype, **options):
    """Fails where a backend's values or gradients are not those of the definition."""
    q, k, v, gradient = inputs(*size, dtype)
    out, lse, *gradients = definition(q, k, v, real, gradient, 0.2)
    found, found_lse = module.forward(q, k, v, real, scale=0.2, dtype=dtype, **options)
    found_gradients = module.backward(q, k, v, real, gradient, out, lse, scale=0.2, dtype=dtype, **options)
    for name, a, b in zip("oldkv", (found, found_lse, *found_gradients), (out, lse, *gradients), strict=True):
        assert np.abs(np.float32(a) - np.float32(b)).max() < TOLERANCE[dtype] * np.abs(b).max(), name


def half_of(samples, length, block):
    """Returns a mask of keys with holes, whose first sample has no real key in its second block."""
    real = np.random.default_rng(0).random((samples, length)) < 0.5
    real[0, block : 2 * block] = False
    return jnp.asarray(real)


TPU_CASES = {
    "heads of 64, padding per sample, few queries": ((2, 130, 300, 2, 64), True, jnp.float32),
    "heads of 128, odd lengths": ((1, 601, 261, 2, 128), False, jnp.float32),
    "heads of 256 in bfloat16, one mask for two samples": ((2, 513, 257, 1, 256), True, jnp.bfloat16),
    "heads of 72, one block": ((1, 127, 128, 1, 72), False, jnp.bfloat16),
    "chunks of a block, padding": ((1, 130, 300, 1, 64), True, jnp.float32),
    "chunks of a block": ((1, 130, 512, 1, 64), False, jnp.float32),
}


@pytest.mark.parametrize("name", TPU_CASES)
def test_tpu_kernels_are_the_reference(name):
    size, padded, dtype = TPU_CASES[name]
    real = half_of(1 if "one mask" in name else size[0], size[2], 128) if padded else None
    with pltpu.force_tpu_interpret_mode():
        compare(flash_tpu, size, real, dtype, most=Blocks(128, 256 if "chunks" in name else 128, 128))


@pytest.mark.parametrize(("logits", "where"), [(2**14, "cpu"), (2**14, "gpu"), (2**22, "cpu")])  # many chunks; one
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
def test_chunks_are_the_reference(monkeypatch, logits, where, dtype, padded):
    """On CPUs heads go one after the other; elsewhere all of them meet a chunk together."""
    monkeypatch.setattr(chunked, "platform", lambda: where)
    real = half_of(2, 409, 137) if padded else None
    compare(chunked, (2, 301, 409, 3, 8), real, dtype, logits=logits)


def test_chunks_bound_memory():
    def bytes_of(length):
        q = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        run = jax.jit(lambda q: chunked.forward(q, q, q, None, scale=1.0, dtype=jnp.float32, logits=2**16))
        return run.lower(q).compile().memory_analysis().temp_size_in_bytes

    assert bytes_of(4096) < 2 * bytes_of(2048) < 2048 * 2048 * 2 * 4 / 4


@pytest.mark.parametrize("module", [chunked, flash_tpu])
def test_a_sample_without_real_keys_counts_for_nothing(module):
    q, k, v, _ = inputs(2, 128, 128, 1, 64, jnp.float32)
    with pltpu.force_tpu_interpret_mode():
        real = jnp.asarray([[True], [False]]) & jnp.ones((2, 128), bool)
        out, lse = module.forward(q, k, v, real, scale=1.0, dtype=jnp.float32)
    assert not np.asarray(out[1]).any()
    assert (lse[1] < -1e29).all()
    assert (np.abs(lse[0]) < 100).all()


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5", "TPU v5 lite", "TPU v6 lite", "TPU7x", "cpu"])
@pytest.mark.parametrize("head", [128, 256, 512, 768, 1024])
def test_blocks_fit_any_length(kind, head):
    for most in largest(head, kind):
        for queries, keys in ((1, 1), (77, 300), (777, 4096), (33_280, 33_280), (310_001, 310_001)):
            blocks, query_steps, key_steps = fit(most, queries, keys, least_steps=4)
            assert all(size % 128 == 0 for size in blocks)
            assert blocks.keys % blocks.chunk == 0
            assert queries <= query_steps * blocks.queries <= max(queries + blocks.queries, 4 * 128)
            assert keys <= key_steps * blocks.keys < keys + blocks.keys
            assert key_steps == 1 or query_steps >= 4
            assert queries < 4096 or query_steps * blocks.queries < 1.05 * queries
