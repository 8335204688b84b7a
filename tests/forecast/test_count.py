"""Operations of traced programs, against those that can be told by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, PartitionSpec

from opensora_jax.forecast import count as counting
from opensora_jax.forecast.count import Kernel, count, flops_of_call
from opensora_jax.forecast.hlo import parse_line

A, B, C = jnp.ones((3, 5)), jnp.ones((5, 7)), jnp.ones((5, 5))


def flops(function, *arguments) -> float:
    return count(jax.make_jaxpr(function)(*arguments).jaxpr).flops


def test_a_product_counts_two_for_each_of_its_multiplications():
    assert flops(jnp.dot, A, B) == 2 * 3 * 5 * 7
    assert flops(lambda a: jnp.einsum("BIJ,BJK->BIK", a, a), jnp.ones((2, 3, 3))) == 2 * 2 * 27


def test_a_convolution_counts_its_taps_and_the_channels_of_a_group():
    def convolve(x, kernel, groups):
        numbers = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "VALID", dimension_numbers=numbers, feature_group_count=groups
        )

    x = jnp.ones((2, 5, 6, 4))
    assert flops(lambda x, k: convolve(x, k, 1), x, jnp.ones((3, 2, 4, 8))) == 2 * 2 * 3 * 5 * 8 * 3 * 2 * 4
    assert flops(lambda x, k: convolve(x, k, 2), x, jnp.ones((3, 2, 2, 8))) == 2 * 2 * 3 * 5 * 8 * 3 * 2 * 2


def test_loops_count_their_length_and_branches_the_larger():
    def body(x, _):
        return x @ C, None

    assert flops(lambda x: jax.lax.scan(body, x, length=11)[0], A) == 11 * 2 * 3 * 25
    both = lambda flag, x: jax.lax.cond(flag, lambda x: x @ C, lambda x: x @ C @ C, x)  # noqa: E731
    assert flops(both, True, A) == 2 * 2 * 3 * 25


def test_of_branches_for_platforms_the_compiled_one_counts():
    def function(x):
        return jax.lax.platform_dependent(x, tpu=lambda x: x @ C, default=lambda x: x @ C @ C @ C)

    jaxpr = jax.make_jaxpr(function)(A).jaxpr
    assert count(jaxpr, "tpu").flops == 2 * 3 * 25
    assert count(jaxpr, "cuda").flops == 3 * 2 * 3 * 25


def test_what_each_device_does_counts_on_all_of_them():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec("a")
    with jax.set_mesh(mesh):
        split = jax.shard_map(lambda x: x @ C, in_specs=spec, out_specs=spec, axis_names={"a"}, check_vma=False)
        assert flops(split, jnp.ones((6, 5))) == 2 * 6 * 25


def kernel(x_ref, y_ref, out_ref):
    @pl.when(pl.program_id(0) >= 0)
    def _():
        out_ref[...] = x_ref[...] @ y_ref[...]


def product(x, y, **options):
    return pl.pallas_call(
        kernel,
        grid=(4,),
        in_specs=[pl.BlockSpec((8, 16), lambda i: (i, 0)), pl.BlockSpec((16, 8), lambda i: (0, 0))],
        out_specs=pl.BlockSpec((8, 8), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((32, 8), jnp.float32),
        name="product",
        **options,
    )(x, y)


def test_a_kernel_counts_its_body_at_every_place_of_its_grid():
    found = count(jax.make_jaxpr(product)(jnp.ones((32, 16)), jnp.ones((16, 8))).jaxpr)
    assert found.kernels == {Kernel("product", ((32, 8),)): 2 * 32 * 16 * 8}
    assert found.flops == found.kernel_flops == 2 * 32 * 16 * 8
    told = pl.CostEstimate(flops=77, transcendentals=0, bytes_accessed=0)
    jaxpr = jax.make_jaxpr(lambda x, y: product(x, y, cost_estimate=told))(jnp.ones((32, 16)), jnp.ones((16, 8)))
    assert count(jaxpr.jaxpr).flops == 77


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("  %flash.3 = (f32[2,3]{1,0}, bf16[4]) custom-call(%x)", 7.0),
        ("  %flash.12 = f32[5]{0} custom-call(%x)", 9.0),
        ("  %flash.12 = f32[6]{0} custom-call(%x)", 9.0),  # no result of this shape was traced: the larger
        ('  %custom-call.1 = f32[5] custom-call(%x), metadata={op_name="jit(f)/flash/pallas_call"}', 9.0),
        ("  %other.3 = f32[5]{0} custom-call(%x)", None),
    ],
)
def test_a_call_is_told_by_its_name_and_the_shapes_of_its_results(line, found):
    kernels = {Kernel("flash", ((2, 3), (4,))): 7.0, Kernel("flash", ((5,),)): 9.0}
    assert flops_of_call(kernels, parse_line(line)) == found
    assert counting.from_json(counting.as_json(kernels)) == kernels
