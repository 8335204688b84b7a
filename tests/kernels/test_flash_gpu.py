"""cuDNN's attention as far as it goes without a GPU: the calls that are compiled, and the order of keys around them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.kernels import chunked, flash_gpu
from opensora_jax.kernels.flash import flash_attention
from tests.kernels.test_flash import compare, half_of, inputs

cudnn = flash_gpu.cudnn


@pytest.fixture
def hopper(monkeypatch):
    """Makes this process believe in a GPU of compute capability 9.0."""
    monkeypatch.setattr(flash_gpu, "_compute_capability", lambda: (9, 0))
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91_000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("padded", [False, True])
def test_cudnn_attends_forwards_and_backwards(padded):
    q = jnp.zeros((2, 77, 3, 128), jnp.bfloat16)
    real = jnp.ones((1, 77), bool) if padded else None
    measure = jax.grad(lambda q: jnp.sum(flash_attention(q, q, q, real, 0.1).astype(jnp.float32)))
    program = jax.jit(measure).trace(q).lower(lowering_platforms=("cuda",)).as_text()
    for direction in ("", "Backward"):
        assert program.count(f"custom_call @__cudnn$fmhaSoftmax{direction}(") == 1
    assert ('"mask_type": "PADDING"' in program.replace("\\22", '"')) == padded
    assert "tpu_custom_call" not in program


@pytest.mark.parametrize(
    ("capability", "dtype", "channels", "obstacle"),
    [
        ((0,), jnp.bfloat16, 128, "this process sees none"),
        ((7, 5), jnp.float16, 128, "from Ampere on"),
        ((8, 0), jnp.bfloat16, 256, "head sizes up to 128 that divide by 8, not 256"),
        ((9, 0), jnp.bfloat16, 100, "head sizes up to 256 that divide by 8, not 100"),
        ((9, 0), jnp.float32, 128, "bfloat16 and float16, not in float32"),
        ((8, 0), jnp.bfloat16, 128, None),
        ((9, 0), jnp.float16, 256, None),
        ((10, 0), jnp.float16, 128, None),
        ((10, 0), jnp.bfloat16, 192, "head sizes up to 128 that divide by 8, not 192"),
        ((12, 0), jnp.bfloat16, 256, "head sizes up to 128 that divide by 8, not 256"),
    ],
)
def test_what_cudnn_cannot_do_has_a_reason(monkeypatch, capability, dtype, channels, obstacle):
    monkeypatch.setattr(flash_gpu, "_compute_capability", lambda: capability)
    found = flash_gpu.obstacle(jnp.zeros((1, 1, 1, channels), dtype))
    assert found is None if obstacle is None else obstacle in found


@pytest.fixture
def fake(monkeypatch):
    """Puts chunks in cuDNN's place, which knows padding at the end alone and leaves NaN where it says nothing."""

    def inside(k, lengths):
        return jnp.arange(k.shape[1]) < lengths[:, None]

    def forward(q, k, v, bias, mask, q_lengths, lengths, *, scale, mask_type, return_residual):
        assert mask_type is cudnn.MaskType.PADDING
        out, lse = chunked.forward(q, k, v, inside(k, lengths), scale=scale, dtype=q.dtype)
        some = (lengths > 0)[:, None, None]
        return jnp.where(some[..., None], out, jnp.nan), jnp.where(some, lse, jnp.nan)

    def backward(scale, mask_type, res, grad_output):
        q, k, v, _, _, lengths, *_, lse, out = res
        dq, dk, dv = chunked.backward(q, k, v, inside(k, lengths), grad_output, out, lse, scale=scale, dtype=q.dtype)
        some, known = (lengths > 0)[:, None, None, None], inside(k, lengths)[..., None, None]
        return jnp.where(some, dq, jnp.nan), jnp.where(known, dk, jnp.nan), jnp.where(known, dv, jnp.nan)

    monkeypatch.setattr(cudnn, "dot_product_attention", forward)
    monkeypatch.setattr(cudnn, "_dot_product_attention_bwd_rule", backward)


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("samples", [1, 2])
def test_padding_goes_to_the_end_and_its_gradients_are_zero(samples):
    compare(flash_gpu, (2, 30, 41, 3, 8), half_of(samples, 41, 11), jnp.float32)


@pytest.mark.usefixtures("fake")
def test_a_sample_without_real_keys_counts_for_nothing():
    q, k, v, gradient = inputs(2, 30, 41, 3, 8, jnp.float32)
    real = jnp.asarray([[True], [False]]) & jnp.ones((2, 41), bool)
    out, lse = flash_gpu.forward(q, k, v, real, scale=1.0, dtype=jnp.float32)
    assert not np.asarray(out[1]).any()
    assert (lse[1] < -1e29).all()
    assert (np.abs(lse[0]) < 100).all()
    whole = out + 1, lse.at[1].set(0.0)  # of other keys
    gradients = flash_gpu.backward(q, k, v, real, gradient, *whole, scale=1.0, dtype=jnp.float32)
    for found in gradients:
        assert not np.asarray(found[1]).any()
        assert np.isfinite(found[0]).all()
