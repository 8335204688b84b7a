"""The autoencoder of Open-Sora 1.2: its temporal half with gradients, the whole in chunks, and its manifest."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import Array

from opensora_jax.config.build import build
from opensora_jax.models.opensora_vae import OpenSoraVAE, OpenSoraVAEConfig
from opensora_jax.models.posterior import Posterior
from opensora_jax.models.temporal_vae import TemporalVAE, TemporalVAEConfig
from opensora_jax.weights.params import load_params
from tests.parity import manifests
from tests.parity.golden import Golden, channels_first, channels_last
from tests.parity.gradients import OUTPUT, compare_gradients

KIND = "opensora_vae"
SIZES = [(frames, 64, 48) for frames in (1, 16, 17, 33, 34, 51)]  # of out/latent_size
PIXELS = {"in_channels": 3, "out_channels": 3}  # a json leaves them out


def temporal(golden: Golden) -> None:
    """Drive `opensora12_vae_temporal*`."""
    config = build(TemporalVAEConfig, golden.about["config"]["vae_temporal"], "config.vae_temporal")
    graphdef, params = _model(golden, lambda: TemporalVAE(config, rngs=nnx.Rngs(0)))
    encode = jax.jit(lambda params, x: nnx.merge(graphdef, params).moments(x))
    decode = jax.jit(lambda params, z, frames: nnx.merge(graphdef, params).reconstruct(z, frames), static_argnums=2)
    lengths = golden.about["config"]["Ts"]
    for frames in lengths:
        x, z = (channels_last(golden.tensors[f"in/{name}_T{frames}"]) for name in "xz")
        moments = encode(params, x)
        golden.compare(f"out/moments_T{frames}", channels_first(moments), OUTPUT)
        golden.compare(f"out/kl_T{frames}", Posterior.of(moments).kl(), OUTPUT)
        golden.compare(f"out/decode_T{frames}", channels_first(decode(params, z, frames)), OUTPUT)

    def reconstruction(params: nnx.State, x: Array) -> Array:
        model = nnx.merge(graphdef, params)
        return model.reconstruct(Posterior.of(model.moments(x)).mean, x.shape[1])

    first = channels_last(golden.tensors[f"in/x_T{lengths[0]}"])
    compare_gradients(golden, KIND, reconstruction, params, first, "__input")


def pipeline(golden: Golden) -> None:
    """Drive `opensora12_vae_pipeline*`."""
    config = _config(golden.about["config"])
    graphdef, params = _model(golden, lambda: OpenSoraVAE(config, rngs=nnx.Rngs(0)))
    video, image, z, z_nomicro = (channels_last(golden.tensors[f"in/{name}"]) for name in _INPUTS)
    normal = _draws(golden, video.shape[:2])

    @jax.jit
    def encoded(params: nnx.State) -> dict[str, Array]:
        model = nnx.merge(graphdef, params)
        found = {"encode_zeronoise": model.encode(video), "image_encode_zeronoise": model.encode(image)}
        with mock.patch("opensora_jax.models.posterior.normal", normal):
            found["encode_sample"] = model.encode(video, jax.random.split(jax.random.key(0), len(video)))
        return found | {"spatial_encode_zeronoise": model.spatial_vae.encode(video)}

    @jax.jit
    def decoded(params: nnx.State, image_z: Array) -> dict[str, Array]:
        model = nnx.merge(graphdef, params)
        frames, micro = video.shape[1], config.micro_frame_size
        chunk = config.latent_frames(micro)
        unscaled = z * jnp.asarray(config.scale) + jnp.asarray(config.shift)
        found = {"decode": model.decode(z, frames=frames), "image_decode": model.decode(image_z, frames=1)}
        found["temporal_decode_chunk0"] = model.decode_time(unscaled[:, :chunk], micro)
        model.config = replace(config, micro_frame_size=None)
        return found | {"decode_nomicro": model.decode(z_nomicro, frames=min(micro, frames))}

    found = encoded(params)
    found |= decoded(params, found["image_encode_zeronoise"])
    golden.compare_found({f"out/{name}": channels_first(one) for name, one in found.items()}, OUTPUT)
    full = replace(config, vae_2d=replace(config.vae_2d, block_out_channels=config.vae_2d.block_out_channels[:1] * 4))
    model = nnx.eval_shape(lambda: OpenSoraVAE(full, rngs=nnx.Rngs(0)))  # the original's stride is 8, whatever it has
    golden.compare("out/latent_size", np.array([model.latent_shape(*size) for size in SIZES]))


def manifest(golden: Golden) -> None:
    """Drive the manifest, which counts the parameters of the two networks as well."""
    for part in ("spatial", "temporal"):
        keys = golden.about["state_dict"]
        count = sum(math.prod(shape) for key, shape in keys.items() if key.startswith(f"{part}_vae."))
        golden.compare(f"{part}_parameters", count)
    manifests.published(golden)


_INPUTS = ("video", "image", "z", "z_nomicro")


def _config(about: dict[str, Any]) -> OpenSoraVAEConfig:
    """Returns the config of a json; the size of the case and of training images say nothing of the network."""
    section = {name: about[name] for name in OpenSoraVAEConfig.__dataclass_fields__}
    spatial = {name: value for name, value in section["vae_2d"].items() if name != "sample_size"}
    return build(OpenSoraVAEConfig, section | {"vae_2d": PIXELS | spatial}, "config")


def _model(golden: Golden, make: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, nnx.State]:
    weights = {name: np.asarray(value, np.float32) for name, value in golden.params()[1].items()}  # stored in float16
    graphdef, shapes = nnx.split(nnx.eval_shape(make))
    return graphdef, load_params(KIND, weights, shapes)


def _draws(golden: Golden, shape: tuple[int, int]) -> Callable[..., Array]:
    """Returns a stand-in for `posterior.normal` that hands out the stored numbers by their shape."""
    in_space = rearrange(golden.tensors["in/noise_spatial"], "(B T) C H W -> B T H W C", B=shape[0], T=shape[1])
    stored = {one.shape: jnp.asarray(one) for one in (in_space, channels_last(golden.tensors["in/noise_temporal"]))}
    return lambda keys, shape, dtype: stored[shape].astype(dtype)
