"""The analytic count against the products of matrices in the traced program."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend import core

from opensora_jax.models.mmdit import MMDiT, MMDiTConfig
from opensora_jax.training.flops import forward_flops, training_flops

SHAPE = {
    "in_channels": 12,
    "vec_in_dim": 7,
    "context_in_dim": 11,
    "hidden_size": 24,
    "mlp_ratio": 3.0,
    "num_heads": 2,
    "depth": 3,
    "depth_single_blocks": 5,
    "axes_dim": (4, 4, 4),
    "theta": 100,
    "qkv_bias": True,
    "use_liger_rope": True,
    "patch_size": 2,
    "grad_ckpt_settings": (0, 0),
    "remat_policy": "full",
}


def products(jaxpr) -> int:
    """Returns the operations of all products in a traced program, loops times their length."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inner in core.jaxprs_in_params(equation.params):
            total += times * products(inner)
    return total


@pytest.mark.parametrize("optional", [False, True])
def test_the_count_is_that_of_the_traced_program(optional):
    config = MMDiTConfig(**SHAPE, fused_qkv=optional, cond_embed=optional, guidance_embed=optional)
    model = nnx.eval_shape(lambda: MMDiT(config, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(model)
    x, text, pooled = jnp.zeros((1, 3, 4, 10, 3)), jnp.zeros((1, 5, 11)), jnp.zeros((1, 7))
    guidance = jnp.zeros(1) if optional else None

    def forward(params):
        return nnx.merge(graph, params)(x, jnp.zeros(1), text, pooled, None, guidance)

    found = products(jax.make_jaxpr(forward)(params).jaxpr)
    assert forward_flops(config, 3 * 2 * 5, 5) == found
    assert training_flops(config, 30, 5) == 3 * found
