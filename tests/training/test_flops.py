"""The analytic count against the products of matrices in the traced programs: forwards, and of a training step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opensora_jax.forecast.count import count
from opensora_jax.models.mmdit import TIME_FEATURES, MMDiT, MMDiTConfig
from opensora_jax.parallel.mesh import one_device
from opensora_jax.training.conditions import ConditionMix
from opensora_jax.training.diffusion import DropoutRatio, FlowConfig, NullText, Objective
from opensora_jax.training.flops import forward_flops, training_flops
from opensora_jax.training.optimizer import OptimConfig
from opensora_jax.training.recipe import Recipe

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
    "remat_policy": "full",
}
LATENT, WORDS = (3, 4, 10, 3), 5
VIDEO = 3 * 2 * 5  # tokens


def shape(optional: bool, remat: int = 0) -> dict:
    settings = {"fused_qkv": optional, "cond_embed": optional, "guidance_embed": optional}
    return SHAPE | settings | {"grad_ckpt_settings": (remat, remat)}


@pytest.mark.parametrize("optional", [False, True])
def test_the_count_is_that_of_the_traced_program(optional):
    config = MMDiTConfig(**shape(optional))
    graph, params = nnx.split(nnx.eval_shape(lambda: MMDiT(config, rngs=nnx.Rngs(0))))
    x, text, pooled = jnp.zeros((1, *LATENT)), jnp.zeros((1, WORDS, 11)), jnp.zeros((1, 7))
    guidance = jnp.zeros(1) if optional else None

    def forward(params):
        return nnx.merge(graph, params)(x, jnp.zeros(1), text, pooled, None, guidance)

    assert forward_flops(config, VIDEO, WORDS) == count(jax.make_jaxpr(forward)(params).jaxpr).flops


def of_step(optional: bool, *, remat: int = 0, parts: int = 1, samples: int = 2) -> float:
    """Returns the operations of the traced training step, on one sample."""
    optim = OptimConfig("adamw", 1e-3, (0.9, 0.99), 1e-8, 0.0, 1.0, 0, "constant", "float32", ())
    recipe = Recipe(0, "float32", {"type": "mmdit"} | shape(optional, remat), None, optim, parts, {}, 0.9, 10)
    mix = ConditionMix.parse({"t2v": 1.0}, is_causal=True)
    null = NullText(jnp.zeros((WORDS, 11)), jnp.zeros(7))
    flow = FlowConfig("logit_normal", stratified=False, flow_shift=None)
    objective = Objective(flow, DropoutRatio(0.1, 0.1), null, mix, 4.0 if optional else None, no_i2v_ref_loss=False)
    assembled = recipe.assemble(objective, one_device(), pretrained=False)
    batch = {"latent": (samples, *LATENT), "text": (samples, WORDS, 11), "pooled": (samples, 7)}
    abstract = {name: jax.ShapeDtypeStruct(dims, np.float32) for name, dims in batch.items()}
    key = jax.eval_shape(lambda: jax.random.key(0))
    return count(jax.make_jaxpr(assembled.step)(assembled.abstract, abstract, key).jaxpr).flops / samples


def first_layers(optional: bool) -> int:
    """Returns the operations, forwards, of the layers whose inputs need no gradient: the data's."""
    h = SHAPE["hidden_size"]
    found = VIDEO * 12 + WORDS * 11 + TIME_FEATURES + 7
    return 2 * h * (found + (VIDEO * (12 + 4) + TIME_FEATURES if optional else 0))


def ends(optional: bool) -> int:
    """Returns the operations, forwards, of all that is no block: those of a model without blocks."""
    config = MMDiTConfig(**(shape(optional) | {"depth": 0, "depth_single_blocks": 0}))
    return forward_flops(config, VIDEO, WORDS)


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_training_step_does_three_times_the_forward_pass_but_for_gradients_of_the_data(optional, parts):
    config = MMDiTConfig(**shape(optional))
    assert training_flops(config, VIDEO, WORDS) == 3 * forward_flops(config, VIDEO, WORDS)
    assert of_step(optional, parts=parts) == training_flops(config, VIDEO, WORDS) - first_layers(optional)


@pytest.mark.parametrize("optional", [False, True])
def test_blocks_that_recompute_their_activations_do_their_forward_pass_once_more(optional):
    config = MMDiTConfig(**shape(optional))
    again = forward_flops(config, VIDEO, WORDS) - ends(optional)
    assert of_step(optional, remat=100) == of_step(optional) + again


def test_the_gradients_of_the_data_are_less_than_a_thousandth_of_the_real_models_step():
    real = SHAPE | {
        "in_channels": 64,
        "vec_in_dim": 768,
        "context_in_dim": 4096,
        "hidden_size": 3072,
        "num_heads": 24,
        "mlp_ratio": 4.0,
        "depth": 19,
        "depth_single_blocks": 38,
        "axes_dim": (16, 56, 56),
        "fused_qkv": False,
        "cond_embed": True,
        "guidance_embed": False,
        "grad_ckpt_settings": (0, 0),
    }
    config, video, words = MMDiTConfig(**real), 33 * 12 * 21, 512
    left_out = 2 * 3072 * (video * (64 + 68) + words * 4096 + TIME_FEATURES + 768)
    assert left_out < 0.001 * training_flops(config, video, words)
