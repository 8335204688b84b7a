"""The causal video autoencoder: posterior, latents, reconstructions, and gradients of mean(reconstruction^2)."""

from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from opensora_jax.models.hunyuan_vae import HunyuanVAE, HunyuanVAEConfig
from opensora_jax.weights.params import load_params
from tests.parity.golden import Golden, Tolerance, channels_first, channels_last
from tests.parity.gradients import compare_gradients

OUTPUT = Tolerance(1e-4)
GRADIENT = Tolerance(5e-4)
DEFAULTS = {  # the original's
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "time_compression_ratio": 4,
    "spatial_compression_ratio": 8,
    "mid_block_add_attention": True,
    "scale_factor": 0.476986,
    "shift_factor": 0.0,
}


def config_of(fields: dict[str, Any]) -> HunyuanVAEConfig:
    """Returns the config of a json, which leaves out what is as in the original."""
    given = DEFAULTS | fields
    known = {name: given[name] for name in HunyuanVAEConfig.__dataclass_fields__ if name in given}
    numbers = {name: float(known[name]) for name in ("scale_factor", "shift_factor")}
    return HunyuanVAEConfig(**known | numbers | {"block_out_channels": tuple(known["block_out_channels"])})


def hunyuan_vae(golden: Golden) -> None:
    """Drive `hunyuan_vae_*` but for tiling and single blocks."""
    config = config_of(golden.about["config"]["model"])
    weights = {name: np.asarray(value, np.float32) for name, value in golden.params()[1].items()}  # stored in float16
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: HunyuanVAE(config, rngs=nnx.Rngs(0))))
    params = load_params("hunyuan_vae", weights, shapes)
    inputs = {name: channels_last(value) for name, value in golden.part("in/").items()}
    encode = jax.jit(lambda params, x: _encoded(nnx.merge(graphdef, params), x, inputs.get("noise")))
    decode = jax.jit(lambda params, z: nnx.merge(graphdef, params).decode(z))
    for name, value in inputs.items():
        if name.startswith("z"):
            golden.compare(f"out/decode_{name}", channels_first(decode(params, value)), OUTPUT)
        elif name != "noise":
            found = encode(params, value)
            found["recon_mode"] = decode(params, found["z_mode"])
            last = {key: one if one.ndim < 5 else channels_first(one) for key, one in found.items()}
            golden.compare_found({f"out/{name}_{key}": one for key, one in last.items()}, OUTPUT)

    def through(params: nnx.State, video: Array) -> Array:
        model = nnx.merge(graphdef, params)
        return model.decode(model.encode(video))

    if "out/loss_mean_recon_sq" in golden.values:
        compare_gradients(golden, "hunyuan_vae", through, params, inputs["video"], "__input_video")


def _encoded(model: HunyuanVAE, x: Array, noise: Array | None) -> dict[str, Array]:
    posterior = model.posterior(x)
    found = {"mean": posterior.mean, "logvar": posterior.logvar, "std": jnp.exp(0.5 * posterior.logvar)}
    found |= {"kl": posterior.kl(), "z_mode": model.encode(x)}
    found["moments"] = model.quant_conv(model.encoder(x))  # its log variance is not clipped
    if noise is not None and noise.shape == posterior.mean.shape:
        found["z_sample"] = _sample(model, x, noise)
    return found


def _sample(model: HunyuanVAE, x: Array, noise: Array) -> Array:
    """Returns a draw of the latent whose normal numbers are `noise`."""
    with mock.patch("opensora_jax.models.posterior.normal", lambda keys, shape, dtype: noise.astype(dtype)):
        return model.encode(x, jax.random.split(jax.random.key(0), len(x)))
