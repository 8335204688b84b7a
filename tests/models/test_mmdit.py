"""MMDiT against golden outputs and gradients of the original, in both layouts of weights."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opensora_jax.config.build import build
from opensora_jax.models.mmdit import MMDiT, MMDiTConfig
from opensora_jax.weights.files import open_checkpoint
from opensora_jax.weights.rename import export_params, load_params

GOLDENS = Path(__file__).parents[1] / "goldens"


def read_golden(name):
    about = json.loads((GOLDENS / f"{name}.json").read_text())["config"]
    fields = {key: about[key] for key in MMDiTConfig.__dataclass_fields__ if key in about}
    tensors = {k: np.asarray(v) for k, v in open_checkpoint(GOLDENS / f"{name}.safetensors").items()}
    return build(MMDiTConfig, fields | {"grad_ckpt_settings": (1, 100)}, "golden"), tensors


def part(tensors, prefix):
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


@pytest.mark.parametrize("name", ["mmdit_mixed_flags", "mmdit_patch1_hc"])
def test_mmdit_equals_the_original_with_gradients(name):
    config, tensors = read_golden(name)
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: MMDiT(config, rngs=nnx.Rngs(0))))
    params = load_params("mmdit", part(tensors, "param/"), shapes)
    inputs = {key: jnp.asarray(value) for key, value in part(tensors, "in/").items()}
    ids = jnp.concatenate([inputs["txt_ids"], inputs["img_ids"]], axis=1)

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.mean(run(params) ** 2)

    def run(params):
        model = nnx.merge(graphdef, params)
        names = ("img", "txt", "timesteps", "y_vec", "cond", "guidance")
        img, txt, t, pooled, condition, guidance = (inputs.get(name) for name in names)
        return model.tokens(img, ids, txt, t, pooled, condition, guidance)

    expected = tensors["out/output"]
    assert np.abs(run(params) - expected).max() <= 1e-4 * np.abs(expected).max()
    gradients = export_params("mmdit", gradient(params))
    for key, wanted in part(tensors, "grad/").items():
        assert np.abs(gradients[key] - wanted).max() <= 5e-4 * np.abs(wanted).max(), key


CONFIG = MMDiTConfig(
    in_channels=12,
    vec_in_dim=5,
    context_in_dim=7,
    hidden_size=24,
    mlp_ratio=2.0,
    num_heads=2,
    depth=2,
    depth_single_blocks=3,
    axes_dim=(4, 4, 4),
    theta=10_000,
    qkv_bias=True,
    guidance_embed=False,
    cond_embed=True,
    fused_qkv=False,
    use_liger_rope=True,
    patch_size=2,
    grad_ckpt_settings=(0, 0),
)


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
    ],
)
def test_sizes_that_do_not_fit_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        MMDiTConfig(**(CONFIG.__dict__ | {field: value}))
