"""The blocks of the causal video autoencoder one by one: convolutions, resampling, residual and attention blocks."""

from collections.abc import Callable, Mapping
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from opensora_jax.kernels.attention import attention
from opensora_jax.models import hunyuan_vae as ours
from opensora_jax.nn import frame_attention
from opensora_jax.nn.conv3d import CausalConv3d
from opensora_jax.weights.params import export_params, load_params
from tests.parity.golden import Golden, Tolerance, channels_first, channels_last

OUTPUT = Tolerance(2e-5)
GRADIENT = Tolerance(1e-4)
MODEL = "hunyuan_vae"


def blocks(golden: Golden) -> None:
    """Drive `hunyuan_vae_blocks*`: every output `<block>__<input>`, and gradients of the middle block."""
    config = golden.about["config"]
    made = _blocks(config["ch"], config["groups"], config["layers"])
    weights = {name: np.asarray(value, np.float32) for name, value in golden.params()[1].items()}  # stored in float16
    inputs = {name: channels_last(value) for name, value in golden.part("in/").items()}
    for name in golden.part("out/"):
        if name.startswith("mask_allowed"):
            frames, positions = (int(part.lstrip("Thw")) for part in name.split("_")[-2:])
            golden.compare(f"out/{name}", frame_attention.frame_causal_mask(frames, positions))
            continue
        block, given = name.split("__")
        graph, params = _load(made[block], weights, block.removesuffix("_nomask"))
        run = jax.jit(lambda params, x, graph=graph: nnx.merge(graph, params)(x))
        with mock.patch.object(frame_attention, "attention", _unmasked if block.endswith("_nomask") else attention):
            golden.compare(f"out/{name}", channels_first(run(params, inputs[given])), OUTPUT)
    graph, params = _load(made["mid"], weights, "mid")
    grads = jax.jit(jax.grad(lambda params: jnp.mean(nnx.merge(graph, params)(inputs["x"]) ** 2)))(params)
    golden.compare_found({f"grad/mid.{k}": g for k, g in export_params(MODEL, grads).items()}, GRADIENT)


def _blocks(width: int, groups: int, layers: int) -> Mapping[str, Callable[..., nnx.Module]]:
    """Returns what makes each block, called with `dtype` and `rngs`."""
    both, space = (2, 2, 2), (1, 2, 2)
    middle = ours.HunyuanVAEConfig(3, 3, 1, (width,) * 3, 1, groups, 4, 8, True, 1.0, 0.0)
    return {
        "conv": partial(CausalConv3d, 3, width),
        "conv_k1": partial(CausalConv3d, width, width + groups, 1),
        "conv_s222": partial(CausalConv3d, 3, width, strides=both),
        "conv_s122": partial(CausalConv3d, 3, width, strides=space),
        "up222": partial(ours.Upsample, width, both),
        "up122": partial(ours.Upsample, width, space),
        "down222": partial(ours.Downsample, width, both),
        "down122": partial(ours.Downsample, width, space),
        "res": partial(ours.ResnetBlock, width, width, groups),
        "res_sc": partial(ours.ResnetBlock, width, 2 * width, groups),
        "mid": partial(ours.MidBlock, middle),
        "mid_nomask": partial(ours.MidBlock, middle),
        "downblock": partial(ours.DownLevel, width, 2 * width, both, layers, groups),
        "upblock": partial(ours.UpLevel, width, 2 * width, both, layers + 1, groups),
    }


def _load(
    make: Callable[..., nnx.Module], weights: Mapping[str, np.ndarray], block: str
) -> tuple[nnx.GraphDef, nnx.State]:
    """Returns a block with the weights whose names start with the block's."""
    graph, shapes = nnx.split(nnx.eval_shape(lambda: make(dtype=jnp.float32, rngs=nnx.Rngs(0))))
    own = {k.removeprefix(f"{block}."): v for k, v in weights.items() if k.startswith(f"{block}.")}
    return graph, load_params(MODEL, own, shapes)


def _unmasked(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    return attention(q, k, v)
