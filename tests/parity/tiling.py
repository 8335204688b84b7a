"""Encoding and decoding in tiles, each tile a call of its own as in `encode` and `decode` of the commands."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from opensora_jax.models.dc_ae import DCAE
from opensora_jax.models.hunyuan_vae import HunyuanVAE
from opensora_jax.weights.params import load_params
from tests.parity import dc_ae
from tests.parity.autoencoder import config_of
from tests.parity.golden import Golden, Tolerance, channels_first, channels_last

OUTPUT = Tolerance(1e-4)
ONE_WAY = {"spatial": (True, False), "temporal": (False, True)}  # inputs of other names are tiled in both ways


def hunyuan_vae(golden: Golden) -> None:
    """Drive `hunyuan_vae_tiling*`."""
    config = config_of(golden.about["config"]["model"])
    weights = {name: np.asarray(value, np.float32) for name, value in golden.params()[1].items()}  # stored in float16
    graph, shapes = nnx.split(nnx.eval_shape(lambda: HunyuanVAE(config, rngs=nnx.Rngs(0))))
    model = nnx.merge(graph, load_params("hunyuan_vae", weights, shapes))
    with _compiled_once(model, "moments"), _compiled_once(model, "reconstruct"):
        _compare(golden, model, _of_moments)


def dcae(golden: Golden) -> None:
    """Drive `dcae_tiling*`."""
    config = dc_ae.config_of(golden.about["config"]["dotlist"])
    model = nnx.merge(*dc_ae.load(partial(DCAE, config), dc_ae.weights_of(golden)))
    with _compiled_once(model, "project"), _compiled_once(model, "reconstruct"):
        _compare(golden, model, _of_latent)


def _compare(golden: Golden, model: HunyuanVAE | DCAE, encoded: Callable[[Any, Array], dict[str, Array]]) -> None:
    """Compare all inputs, each tiled as its name says; `encoded` gives what there is of a video beside `z`."""
    base = model.config
    for name, value in golden.part("in/").items():
        kind, case = name.split("_", 1)
        spatial, temporal = ONE_WAY.get(case, (True, True))
        model.config = replace(base, use_spatial_tiling=spatial, use_temporal_tiling=temporal)
        x = channels_last(value)
        found = {"decode": model.decode(x)} if kind == "z" else {"z": model.encode(x)} | encoded(model, x)
        for key, one in found.items():
            golden.compare(f"out/{case}_{key}", channels_first(one), OUTPUT)


def _of_moments(model: HunyuanVAE, video: Array) -> dict[str, Array]:
    posterior = model.posterior(video)
    moments = jnp.concatenate([posterior.mean, posterior.logvar], -1)
    return {"moments": moments, "untiled_moments": model.moments(video)}


def _of_latent(model: DCAE, video: Array) -> dict[str, Array]:
    model.config = replace(model.config, use_spatial_tiling=False, use_temporal_tiling=False)
    return {"untiled_z": model.encode(video)}


def _compiled_once(model: nnx.Module, method: str) -> AbstractContextManager:
    """Returns a context in which a method of a tile compiles once for all ways to tile."""
    graph, params = nnx.split(model)
    plain = getattr(type(model), method).__wrapped__
    run = jax.jit(lambda params, x: plain(nnx.merge(graph, params), x))
    return mock.patch.object(type(model), method, lambda self, x: run(params, x))
