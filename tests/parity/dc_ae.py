"""The deep-compression video autoencoder: single blocks, then latents, reconstructions and gradients of a network."""

import ast
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from opensora_jax.config.build import build
from opensora_jax.models import dc_ae as ours
from opensora_jax.models.dc_ae_config import DCAEConfig, DecoderConfig, EncoderConfig
from opensora_jax.nn.conv import Conv
from opensora_jax.nn.efficient_vit import (
    ConvLayer,
    EfficientViTBlock,
    GLUMBConv,
    LiteMLA,
    ResBlock,
    Residual,
    make_norm,
)
from opensora_jax.nn.pixel_shuffle import Averaging, Duplicating, pixel_shuffle, pixel_unshuffle
from opensora_jax.weights.params import export_params, load_params
from tests.parity import manifests
from tests.parity.golden import Golden, Tolerance, channels_first, channels_last
from tests.parity.gradients import compare_gradients

MODEL = "dc_ae"
OUTPUT, BLOCK_OUTPUT, BLOCK_GRADIENT = Tolerance(1e-4), Tolerance(2e-5), Tolerance(1e-4)
DIFFERENTIATED = {"evit": "xw", "down_t": "x"}  # block -> the input at which gradients are stored
TRIPLE = (3, 3, 3)


def network(golden: Golden) -> None:
    """Drive `dcae_core*`: encode, decode, stages of the encoder, scaling, and gradients."""
    config = config_of(golden.about["config"]["dotlist"])
    scaled = replace(config, scaling_factor=golden.about["config"]["case"]["scaling_factor"])
    graph, params = load(partial(ours.DCAE, config), weights_of(golden))
    scaled_graph, _ = load(partial(ours.DCAE, scaled), weights_of(golden))
    run = jax.jit(lambda graph, params, x, method: getattr(nnx.merge(graph, params), method)(x), static_argnums=(0, 3))
    inputs = {name: channels_last(value) for name, value in golden.part("in/").items()}
    for name, x in inputs.items():
        method, result = ("decode", f"decode_{name}") if name.startswith("z") else ("encode", f"{name}_z")
        found = {result: run(graph, params, x, method)}
        if method == "encode":
            found[f"{name}_recon"] = run(graph, params, found[result], "decode")
        if {f"out/{result}_scaled", f"out/{result}_scaled_frame0"} & golden.left:
            found[f"{result}_scaled"] = run(scaled_graph, params, x, method)
            found[f"{result}_scaled_frame0"] = found[f"{result}_scaled"][:, :1]
        if f"out/{result}_is_training" in golden.left:
            found[f"{result}_is_training"] = run(scaled_graph, params, x, "project")
        golden.compare_found({f"out/{key}": channels_first(value) for key, value in found.items()}, OUTPUT)
    stages = jax.jit(lambda params, x: _stages(nnx.merge(graph, params).encoder, x))(params, inputs["video"])
    golden.compare_found({f"out/{key}": channels_first(value) for key, value in stages.items()}, OUTPUT)
    compare_gradients(golden, MODEL, partial(_reconstruction, graph), params, inputs["video"], "__input_video")


def blocks(golden: Golden) -> None:
    """Drive `dcae_blocks*`: every output `<block>__<input>`, and gradients of two blocks."""
    config = golden.about["config"]
    made = _blocks(config["ch"], config["width"], config["expand"])
    functions = _functions(config["ch"])
    weights = weights_of(golden)
    inputs = golden.part("in/")
    for name in golden.part("out/"):
        block, given = name.split("__")
        if block in functions:
            golden.compare(f"out/{name}", _with_time(functions[block], inputs[given]), BLOCK_OUTPUT)
            continue
        alone = f"{block}.weight" in weights  # a layer, not a module of layers: its name in itself is empty
        graph, params = load(made[block], weights, block if alone else f"{block}.")
        run = jax.jit(lambda params, x, graph=graph: nnx.merge(graph, params)(x))
        golden.compare(f"out/{name}", _with_time(partial(run, params), inputs[given]), BLOCK_OUTPUT)
    for block, given in DIFFERENTIATED.items():
        graph, params = load(made[block], weights, f"{block}.")
        x = channels_last(inputs[given])
        gradient = jax.jit(jax.grad(lambda params, x=x, graph=graph: jnp.mean(nnx.merge(graph, params)(x) ** 2)))
        found = export_params(MODEL, gradient(params))
        golden.compare_found({f"grad/{block}.{key}": value for key, value in found.items()}, BLOCK_GRADIENT)


def manifest(golden: Golden) -> None:
    """Drive `manifest:dc_ae`: keys and shapes, and what the original's name of the network stands for."""
    config = build(DCAEConfig, golden.about["config"], golden.path.name)
    found = {"encoder_width": config.encoder.width_list, "encoder_depth": config.encoder.depth_list}
    found |= {"decoder_depth": config.decoder.depth_list, "latent_channels": config.latent_channels}
    found |= {"scaling_factor": config.scaling_factor}
    theirs = golden.take("effective")
    golden.check("effective", {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}, theirs)
    manifests.published(golden)


def config_of(dotlist: list[str]) -> DCAEConfig:
    """Returns the config of lines such as "encoder.width_list=[8,8]"."""
    fields: dict[str, Any] = {"model_name": None}
    for line in dotlist:
        path, text = line.split("=", 1)
        *parents, name = path.split(".")
        section = fields
        for parent in parents:
            section = section.setdefault(parent, {})
        quoted = re.sub(r"(?<![\w.])(?!(?:True|False|None)\b)[A-Za-z]\w*", lambda word: repr(word[0]), text)
        section[name] = ast.literal_eval(quoted)
    return build(DCAEConfig, fields, "dotlist")


def weights_of(golden: Golden) -> dict[str, np.ndarray]:
    """Returns the weights of a case, which are stored in float16."""
    return {name: np.asarray(value, np.float32) for name, value in golden.params()[1].items()}


def load(
    make: Callable[..., nnx.Module], weights: Mapping[str, np.ndarray], prefix: str = ""
) -> tuple[nnx.GraphDef, nnx.State]:
    """Returns a module, called with `dtype` and `rngs`, with those weights whose names start with the prefix."""
    graph, shapes = nnx.split(nnx.eval_shape(lambda: make(dtype=jnp.float32, rngs=nnx.Rngs(0))))
    own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    return graph, load_params(MODEL, own, shapes)


def _blocks(c: int, width: int, expand: int) -> Mapping[str, Callable[..., nnx.Module]]:
    """Returns what makes each block, called with `dtype` and `rngs`."""
    down = EncoderConfig(norm="rms3d", downsample_block_type="Conv", is_video=True)
    up = DecoderConfig(norm="rms3d", upsample_block_type="InterpolateConv", out_norm="rms3d", is_video=True)
    return {
        "conv": partial(_conv, 3, c),
        "conv_s222": partial(_conv, c, 2 * c, strides=(2, 2, 2)),
        "conv_s122": partial(_conv, c, 2 * c, strides=(1, 2, 2)),
        "conv_rms_silu": partial(_conv, c, c, bias=False, norm="rms3d", act=jax.nn.silu),
        **{name: partial(_norm, name, c) for name in ("rms3d", "rms2d", "ln2d")},
        "resblock": lambda **options: Residual(ResBlock(c, 3, "rms3d", "silu", **options)),
        "litemla": partial(LiteMLA, width, 3, "rms3d", (5,)),
        "litemla_noscale": partial(LiteMLA, width, 3, "rms3d", ()),
        "glumb": partial(GLUMBConv, width, 3, "rms3d", "silu", expand),
        "evit": partial(EfficientViTBlock, width, 3, "rms3d", "silu", (5,)),
        "up_conv_t": partial(ours.InterpolateConv, c, 2 * c, 3, True),
        "up_conv_s": partial(ours.InterpolateConv, c, 2 * c, 3, False),
        "down_t": partial(ours.make_downsample, down, c, 2 * c, True),
        "down_s": partial(ours.make_downsample, down, c, 2 * c, False),
        "up_t": partial(ours.make_upsample, up, 2 * c, c, True),
        "up_s": partial(ours.make_upsample, up, 2 * c, c, False),
        "enc_out": partial(ours.make_encoder_out, EncoderConfig(), 2 * c, c // 2, TRIPLE),
        "dec_in": partial(ours.make_decoder_in, up, c // 2, 2 * c, TRIPLE),
        "dec_out": partial(ours.make_decoder_out, up, c, 3, TRIPLE),
        "pus2d": partial(ours.ConvUnshuffle, c, 2 * c, 2),
        "ps2d": partial(ours.ConvShuffle, 2 * c, c, 2),
    }


def _functions(c: int) -> Mapping[str, Callable[[Array], Array]]:
    """Returns the blocks without parameters."""
    return {
        "avg_t": Averaging(2 * c, 2, True),
        "avg_s": Averaging(2 * c, 2),
        "avg_4d": Averaging(2 * c, 2),
        "avg_f1": Averaging(c // 2, 1),
        "dup_t": Duplicating(c, 2, True),
        "dup_s": Duplicating(c, 2),
        "dup_f1": Duplicating(2 * c, 1),
        "pixel_unshuffle_3d": lambda x: pixel_unshuffle(x, (2, 2, 2)),
        "pixel_shuffle_3d": lambda x: pixel_shuffle(x[..., :16], (2, 2, 2)),
    }


def _conv(c_in: int, c_out: int, *, norm: str | None = None, act: Any = None, rngs: nnx.Rngs, **options: Any) -> Any:
    return ConvLayer(Conv(c_in, c_out, TRIPLE, rngs=rngs, **options), make_norm(norm, c_out, rngs), act)


def _norm(name: str, features: int, *, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
    return make_norm(name, features, rngs)


def _with_time(run: Callable[[Array], Array], x: np.ndarray) -> np.ndarray:
    """Returns what `run` gives of [B] C T H W, or of images B C H W."""
    if x.ndim == 5:
        return channels_first(run(channels_last(x)))
    return channels_first(run(channels_last(x[:, :, None])))[:, :, 0]


def _stages(encoder: ours.Encoder, x: Array) -> dict[str, Array]:
    found, x = {}, encoder.project_in(x)
    for i, stage in enumerate(encoder.stages):
        x = found[f"enc_stage{i}"] = stage(x)
    return found


def _reconstruction(graph: nnx.GraphDef, params: nnx.State, video: Array) -> Array:
    model = nnx.merge(graph, params)
    return model.decode(model.encode(video))
