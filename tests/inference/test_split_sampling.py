"""Sampling on a mesh that splits samples, tokens and heads gives what one device gives."""

import jax
import numpy as np
import pytest
from flax import nnx

from opensora_jax.diffusion.sampler import Prompt, branch_prompts
from opensora_jax.inference.pipeline import Pipeline
from opensora_jax.inference.request import SamplingOption
from opensora_jax.models.mmdit import MMDiT
from opensora_jax.parallel.mesh import MeshConfig, make_mesh, one_device
from opensora_jax.parallel.rules import param_shardings
from tests.inference.fakes import Autoencoder, encode_text
from tests.models.tiny import mmdit

CONFIG = mmdit(
    in_channels=12, vec_in_dim=5, context_in_dim=7, num_heads=4, depth=1, depth_single_blocks=1, axes_dim=(2, 2, 2)
)
OPTION = SamplingOption(
    resolution=None,
    aspect_ratio=None,
    height=16,
    width=24,
    num_frames=9,
    num_steps=2,
    shift=True,
    flow_shift=None,
    guidance=3.0,
    guidance_img=2.0,
    text_osci=False,
    image_osci=False,
    scale_temporal_osci=False,
    method="i2v",
    seed=0,
)


def sample(mesh, cond_type):
    """Returns two latents of 3 x 4 x 6; `i2v_head` begins each with an image of its own."""
    model = MMDiT(CONFIG, rngs=nnx.Rngs(0))
    for layer in (model.final_layer.linear, model.cond_in):
        layer.kernel[...] = 0.3 * jax.random.normal(jax.random.key(1), layer.kernel.shape)
    graphdef, params = nnx.split(model)
    model = nnx.merge(graphdef, jax.device_put(params, param_shardings(params, mesh)))
    keys = jax.random.split(jax.random.key(2), 4)
    noise, images = jax.random.normal(keys[0], (2, 3, 4, 6, 3)), jax.random.normal(keys[1], (2, 1, 4, 6, 3))
    prompt = Prompt(jax.random.normal(keys[2], (2, 3, 7)), jax.random.normal(keys[3], (2, 5)))
    prompts = branch_prompts(prompt, Prompt(-prompt.text, -prompt.pooled))
    pipeline = Pipeline(model, Autoencoder(), encode_text, mesh, 2, 1)
    references = [[] if cond_type == "t2v" else [image] for image in images]
    return pipeline.denoise(noise, prompts, references, OPTION, cond_type)


@pytest.mark.parametrize(
    ("method", "cond_type"),
    [("ulysses", "i2v_head"), ("ring", "i2v_head"), ("ulysses", "t2v")],  # 3 branches split tokens, 2 are one for each
)
def test_a_sample_on_data_2_seq_2_tensor_2_is_that_of_one_device(method, cond_type):
    found = sample(make_mesh(MeshConfig(data=2, fsdp=1, seq=2, tensor=2, seq_method=method)), cond_type)
    expected = sample(one_device(), cond_type)
    assert np.std(expected) > 0.5
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
