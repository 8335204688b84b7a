"""The one call: what it computes, which backend it takes and says so, what it refuses."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from opensora_jax.kernels import choice, reference
from opensora_jax.kernels.attention import attention, check_shapes
from opensora_jax.kernels.flash import ATTENTION, STATISTICS


def normal(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def test_attention_is_a_softmax_average_head_by_head():
    q, k, v = (normal(2, length, 3, 4, seed=i) for i, length in enumerate((5, 7, 7)))
    mask = jnp.tril(jnp.ones((5, 7), bool))[None, None]
    out = np.asarray(attention(q, k, v, mask=mask))
    for b, n, i in np.ndindex(2, 3, 5):
        logits = np.asarray(k[b, : i + 1, n] @ q[b, i, n]) / 2.0
        weights = np.exp(logits - logits.max())
        np.testing.assert_allclose(out[b, i, n], weights / weights.sum() @ v[b, : i + 1, n], rtol=2e-5, atol=1e-6)


def test_a_bias_is_added_to_the_logits_before_the_softmax():
    q = k = jnp.zeros((1, 2, 1, 4))
    v = jnp.asarray([1.0, 5.0])[None, :, None, None] * jnp.ones(4)
    bias = jnp.log(jnp.asarray([[1.0, 3.0], [1.0, 1.0]]))[None, None]
    np.testing.assert_allclose(attention(q, k, v, bias=bias)[0, :, 0, 0], [4.0, 3.0], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_long_sequences_get_the_values_and_gradients_of_the_reference(dtype):
    q, k, v = (normal(2, length, 3, 16, seed=i, dtype=dtype) for i, length in enumerate((541, 601, 601)))
    mask = (jnp.arange(601) % 7 != 3)[None, None, None] & (jnp.arange(601) < jnp.asarray([[601], [500]]))[:, None, None]
    assert choice.choose(q, k, v, mask, None).backend == "flash"

    def both(function):
        measure = lambda *x: jnp.mean(jnp.sin(3 * function(*x, mask=mask, scale=0.3).astype(jnp.float32)))  # noqa: E731
        return function(q, k, v, mask=mask, scale=0.3), *jax.jit(jax.grad(measure, (0, 1, 2)))(q, k, v)

    for found, expected in zip(both(attention), both(reference.attention), strict=True):
        error = np.linalg.norm(np.float32(found - expected)) / np.linalg.norm(np.float32(expected))
        assert error < (2e-6 if dtype == jnp.float32 else 1e-2)


def test_half_precision_that_a_chip_lacks_goes_in_chunks():
    for dtype, kernels in (jnp.bfloat16, 1), (jnp.float16, 0):
        q = jax.ShapeDtypeStruct((1, 2048, 1, 128), dtype)
        program = jax.jit(attention).trace(q, q, q).lower(lowering_platforms=("tpu",)).as_text()
        assert program.count("tpu_custom_call") == kernels


def test_what_a_policy_keeps_spares_the_second_forward_pass():
    q = normal(1, 600, 3, 8)
    keep = jax.checkpoint_policies.save_only_these_names(ATTENTION, STATISTICS)

    def kernels(policy):
        measure = jax.checkpoint(lambda q: jnp.sum(attention(q, q, q)), policy=policy)
        return str(jax.make_jaxpr(jax.grad(measure))(q)).count("platform_index[")

    assert kernels(keep) == 2  # forwards and backwards
    assert kernels(None) == 3


Q = jax.ShapeDtypeStruct((2, 600, 3, 64), jnp.bfloat16)
K = jax.ShapeDtypeStruct((2, 700, 3, 64), jnp.bfloat16)
HUGE = [jax.ShapeDtypeStruct((1, 2048, 1, 512), jnp.bfloat16)] * 3


@pytest.mark.parametrize(
    ("arrays", "mask", "bias", "backend", "reason"),
    [
        ((Q, K, K), None, None, "flash", "many logits"),
        ((Q, K, K), (1, 1, 1, 700), None, "flash", "many logits"),
        ((Q, K, K), (1, 1, 600, 700), None, "reference", "the mask differs between queries or heads"),
        ((Q, K, K), None, (1, 3, 600, 700), "reference", "a bias"),
        ((Q, K, jax.ShapeDtypeStruct(K.shape, jnp.float32)), None, None, "reference", "differ in dtype"),
        ([jax.ShapeDtypeStruct((2, 300, 3, 64), jnp.bfloat16)] * 3, None, None, "reference", "few logits"),
        ([jax.ShapeDtypeStruct((512, 77, 12, 64), jnp.bfloat16)] * 3, None, None, "reference", "few logits"),
        (HUGE, None, None, "chunked", "head sizes up to 256, not 512"),
    ],
)
def test_the_backend_follows_from_shapes(arrays, mask, bias, backend, reason):
    mask = None if mask is None else jax.ShapeDtypeStruct(mask, jnp.bool_)
    bias = None if bias is None else jax.ShapeDtypeStruct(bias, jnp.float32)
    found = choice.choose(*arrays, mask, bias)
    assert found.backend == backend
    assert reason in found.reason


def test_no_kernel_runs_where_the_compiler_splits_arrays():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        assert choice.choose(Q, K, K, None, None).backend == "chunked"


def test_a_choice_is_logged_once(caplog):
    choice.announce.cache_clear()
    q, huge = normal(1, 600, 3, 8), normal(1, 600, 3, 260)
    with caplog.at_level(logging.INFO, "absl"):
        for x in (q, q, huge, huge, q[:, :9]):
            jax.eval_shape(attention, x, x, x)
    assert [record.message.split(", since ")[0] for record in caplog.records] == [
        "attention on cpu: XLA in chunks",
        "attention on cpu: XLA in chunks",
        "attention on cpu: reference",
    ]
    assert "260" in caplog.records[1].message


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 5, 3, 4), (2, 7, 3, 4), (2, 6, 3, 4)), r"got \(2, 5, 3, 4\), \(2, 7, 3, 4\) and \(2, 6, 3, 4\)"),
        (
            ((2, 5, 3, 4), (2, 7, 1, 4), (2, 7, 1, 4)),
            "keys and values of one shape that differs from it in length",
        ),
        (((5, 3, 4), (7, 3, 4), (7, 3, 4)), r"\(batch, length, heads, head size\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes, message):
    with pytest.raises(ValueError, match=message):
        check_shapes(*(jnp.zeros(shape) for shape in shapes), None, None)


@pytest.mark.parametrize("shape", [(2, 3, 5, 1), (2, 1, 7), (3, 1, 1, 7)])
def test_a_mask_that_does_not_fit_is_named(shape):
    q, k = jnp.zeros((2, 5, 3, 4)), jnp.zeros((2, 7, 3, 4))
    with pytest.raises(ValueError, match=r"the mask of attention must have the shape of its logits, \(2, 3, 5, 7\)"):
        check_shapes(q, k, k, jnp.ones(shape, bool), None)
