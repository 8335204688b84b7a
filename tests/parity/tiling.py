"""Encoding and decoding in tiles, each tile a call of its own as in `encode` and `decode` of the commands."""

from contextlib import AbstractContextManager
from dataclasses import replace
from unittest import mock

import jax
import numpy as np
from flax import nnx
from jax import Array

from opensora_jax.models.hunyuan_vae import HunyuanVAE
from opensora_jax.weights.params import load_params
from tests.parity.autoencoder import config_of
from tests.parity.golden import QUICK, Golden, Tolerance, channels_first, channels_last

OUTPUT = Tolerance(1e-4)
ONE_WAY = {"spatial": (True, False), "temporal": (False, True)}  # inputs of other names are tiled in both ways


def hunyuan_vae(golden: Golden) -> None:
    """Drive `hunyuan_vae_tiling*`: one network, tiled as the name of each input says."""
    config = config_of(golden.about["config"]["model"])
    weights = {name: np.asarray(value, np.float32) for name, value in golden.params()[1].items()}  # stored in float16
    graph, shapes = nnx.split(nnx.eval_shape(lambda: HunyuanVAE(config, rngs=nnx.Rngs(0))))
    model = nnx.merge(graph, load_params("hunyuan_vae", weights, shapes))
    with _quick(model, "moments"), _quick(model, "reconstruct"):
        for name, value in golden.part("in/").items():
            kind, case = name.split("_", 1)
            spatial, temporal = ONE_WAY.get(case, (True, True))
            model.config = replace(config, use_spatial_tiling=spatial, use_temporal_tiling=temporal)
            if kind == "z":
                golden.compare(f"out/{case}_decode", channels_first(model.decode(channels_last(value))), OUTPUT)
            else:
                _compare_encoded(golden, case, model, channels_last(value))


def _compare_encoded(golden: Golden, case: str, model: HunyuanVAE, video: Array) -> None:
    posterior = model.posterior(video)
    moments = np.concatenate([posterior.mean, posterior.logvar], -1)
    golden.compare(f"out/{case}_moments", channels_first(moments), OUTPUT)
    golden.compare(f"out/{case}_untiled_moments", channels_first(model.moments(video)), OUTPUT)
    golden.compare(f"out/{case}_z", channels_first(model.encode(video)), OUTPUT)


def _quick(model: nnx.Module, method: str) -> AbstractContextManager:
    """Returns a context in which a method of a tile compiles quickly, and once for all ways to tile."""
    graph, params = nnx.split(model)
    plain = getattr(type(model), method).__wrapped__
    run = jax.jit(lambda params, x: plain(nnx.merge(graph, params), x), compiler_options=QUICK)
    return mock.patch.object(type(model), method, lambda self, x: run(params, x))
