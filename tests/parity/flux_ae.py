"""The image autoencoder of Flux on frames: posterior, latents, reconstructions, and gradients."""

from typing import Any
from unittest import mock

import jax
import numpy as np
from flax import nnx
from jax import Array

from opensora_jax.config.build import build
from opensora_jax.models.flux_ae import FluxAE, FluxAEConfig
from opensora_jax.models.posterior import Posterior
from opensora_jax.weights.params import load_params
from tests.parity.golden import Golden, channels_first, channels_last
from tests.parity.gradients import OUTPUT, compare_gradients


def flux_ae(golden: Golden) -> None:
    """Drive `flux_ae*`."""
    config = build(FluxAEConfig, golden.about["config"]["model"], "config.model")
    weights = {name: np.asarray(value, np.float32) for name, value in golden.params()[1].items()}  # stored in float16
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: FluxAE(config, rngs=nnx.Rngs(0))))
    params = load_params("flux_ae", weights, shapes)
    inputs = {name: channels_last(value) for name, value in golden.part("in/").items()}
    noise = inputs.pop("noise", None)
    encode = jax.jit(lambda params, x: _encoded(nnx.merge(graphdef, params), x, noise))
    decode = jax.jit(lambda params, z: nnx.merge(graphdef, params).decode(z))
    for name, value in inputs.items():
        if name.startswith("z"):
            golden.compare(f"out/decode_{name}", channels_first(decode(params, value)), OUTPUT)
        else:
            golden.compare_found({f"out/{name}_{key}": one for key, one in encode(params, value).items()}, OUTPUT)
    if "out/loss_mean_recon_sq" in golden.values:

        def reconstruction(params: nnx.State, video: Array) -> Array:
            model = nnx.merge(graphdef, params)
            return model.decode(model.encode(video))

        compare_gradients(golden, "flux_ae", reconstruction, params, inputs["video"], "__input_video")


def _encoded(model: FluxAE, x: Array, noise: Array | None) -> dict[str, Any]:
    moments = model.moments(x)
    posterior = Posterior.of(moments)
    found = {"moments": moments, "mean": posterior.mean, "logvar": posterior.logvar, "z_mode": model.encode(x)}
    if noise is not None and noise.shape == posterior.mean.shape:
        with mock.patch("opensora_jax.models.posterior.normal", lambda keys, shape, dtype: noise.astype(dtype)):
            found["z_sample"] = model.encode(x, jax.random.split(jax.random.key(0), len(x)))
    found = {name: jax.numpy.moveaxis(one, -1, 1) for name, one in found.items()}
    return found | {"kl": posterior.frame_kl().reshape(-1)}
