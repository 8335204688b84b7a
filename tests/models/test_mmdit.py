"""What goldens do not say of MMDiT (tests/parity has those): its first outputs, and sizes that it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opensora_jax.models.mmdit import MMDiT, MMDiTConfig
from tests.models.tiny import mmdit

CONFIG = mmdit(in_channels=12, vec_in_dim=5, context_in_dim=7, theta=10000)


def test_an_untrained_mmdit_predicts_velocity_zero_in_the_shape_of_its_input():
    x = jnp.ones((1, 2, 4, 6, 3))
    graphdef, params = nnx.split(MMDiT(CONFIG, rngs=nnx.Rngs(0)))
    run = jax.jit(lambda params, *inputs: nnx.merge(graphdef, params)(*inputs))
    velocity = run(params, x, jnp.ones(1), jnp.ones((1, 11, 7)), jnp.ones((1, 5)))
    np.testing.assert_array_equal(velocity, np.zeros(x.shape))


def test_a_latent_that_no_patch_divides_is_refused_by_name():
    model = nnx.eval_shape(lambda: MMDiT(CONFIG, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="got 5x6"):
        model(jnp.ones((1, 1, 5, 6, 3)), jnp.ones(1), jnp.ones((1, 1, 7)), jnp.ones((1, 5)))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_heads", 5, "divisible by num_heads"),
        ("axes_dim", (4, 4, 6), "sum to the head size 12"),
        ("in_channels", 13, "divisible by patch_size"),
        ("num_heads", 0, "num_heads is at least 1: got 0"),
        ("patch_size", -1, "patch_size is at least 1: got -1"),
        ("axes_dim", (-4, 8, 8), "axes_dim is at least 0"),
        ("grad_ckpt_settings", (100, -1), "grad_ckpt_settings is at least 0"),  # it would leave blocks out
    ],
)
def test_sizes_that_do_not_fit_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        MMDiTConfig(**(CONFIG.__dict__ | {field: value}))
