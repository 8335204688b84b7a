"""Do a list of published keys and our parameters fit each other? Answered from shapes alone: nothing is allocated.

A manifest is a JSON file with `config` (fields of the network in the original's names), `state_dict` (key -> shape)
and `total_parameters`, as written from the original model on torch's meta device.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from flax import nnx

from opensora_jax.config.build import build
from opensora_jax.config.errors import UserError
from opensora_jax.weights.files import read_json
from opensora_jax.weights.pretrained import MODELS
from opensora_jax.weights.rename import NAMES, first_of, is_ignored, parameter_keys

Shape = tuple[int, ...]
SHOWN = 5

# Fields that manifests leave out, with the values that the original's code fills in.
LEFT_OUT: dict[str, dict[str, Any]] = {
    "mmdit": {
        "fused_qkv": True,
        "use_liger_rope": False,
        "patch_size": 2,
        "grad_ckpt_settings": (0, 0),
        "remat_policy": "full",
    },
    "t5": {"feed_forward_proj": "gated-gelu"},
    "clip": {"eos_token_id": 2},
    "hunyuan_vae": {},
    "flux_ae": {},
    "dc_ae": {},
    "opensora_vae": {
        "vae_2d": {  # SDXL's
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": (128, 256, 512, 512),
            "layers_per_block": 2,
            "latent_channels": 4,
            "norm_num_groups": 32,
        },
        "vae_temporal": {  # VAE_Temporal_SD
            "in_out_channels": 4,
            "latent_embed_dim": 4,
            "embed_dim": 4,
            "filters": 128,
            "num_res_blocks": 4,
            "channel_multipliers": (1, 2, 2, 4),
            "temporal_downsample": (False, True, True),
            "num_groups": 32,
        },
    },
    "lpips": {},
    "discriminator": {},
}
TYPES = {  # the original's names of our kinds, where they differ
    "autoencoder_2d": "flux_ae",
    "VideoAutoencoderPipeline": "opensora_vae",
    "LPIPS": "lpips",
    "N_Layer_discriminator_3D": "discriminator",
}


@dataclass(frozen=True)
class Manifest:
    """What a published model consists of; `config` is ours, `parameters` counts values."""

    name: str
    kind: str
    config: Any
    shapes: Mapping[str, Shape]
    parameters: int


@dataclass(frozen=True)
class Match:
    """The outcome of a comparison; `faults` is empty when every key has one place with its shape, and back."""

    keys: int
    tensors: int  # our arrays, in which layers are stacked
    parameters: int
    faults: tuple[str, ...]


def read_manifest(path: Path) -> Manifest:
    """Returns a manifest with the kind of model that its fields belong to.

    Raises: UserError for a file that is no manifest, or one of a model that is not here.
    """
    content = read_json(path)
    absent = {"config", "state_dict", "total_parameters"} - content.keys()
    if absent:
        raise UserError(f"{path} is no manifest: it lacks {', '.join(sorted(absent))}; give a list of keys and shapes.")
    given = content.get("effective_defaults", {}) | content["config"]
    named = content.get("type")
    kind = TYPES.get(named, named) if named else _kind_of(given)
    if kind not in MODELS:
        raise UserError(
            f"{path} is of a model that is not here ({kind or 'unknown fields'}); known are {', '.join(MODELS)}."
        )
    config_class = MODELS[kind][0]
    known = {field.name for field in fields(config_class)}
    options = LEFT_OUT[kind] | {name: value for name, value in given.items() if name in known}
    shapes = {key: tuple(shape) for key, shape in content["state_dict"].items()}
    return Manifest(path.name, kind, build(config_class, options, str(path)), shapes, content["total_parameters"])


def compare(kind: str, config: Any, shapes: Mapping[str, Shape], parameters: int | None = None) -> Match:
    """Returns how published keys and shapes fit the network of a config; `parameters` is the count to expect.

    Running statistics have keys like parameters and do not count as such; published constants are passed over.
    """
    module = MODELS[kind][1]
    model = nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0)))
    tensors, params = nnx.state(model), nnx.state(model, nnx.Param)
    places = parameter_keys(kind, tensors)  # (key, published shape) of every layer of every tensor
    ours = dict(places)
    known = ours | {copy: ours[original] for copy, original in NAMES[kind].tied}
    counted = sum(math.prod(leaf.shape) for _, leaf in nnx.to_flat_state(params))
    twice = [key for key, count in Counter(key for key, _ in places).items() if count > 1]
    wrong = [
        f"{key} is {shape} and {known[key]} here"
        for key, shape in shapes.items()
        if key in known and known[key] != shape
    ]
    found = {
        "without a place here": [key for key in shapes if key not in known and not is_ignored(kind, key)],
        "missing there": [key for key in ours if key not in shapes],
        "of another shape": wrong,
        "claimed by two parameters": twice,
        "parameters": [] if parameters in (None, counted) else [f"{parameters:,} there, {counted:,} here"],
    }
    faults = tuple(f"{what}: {first_of(keys, SHOWN)}" for what, keys in found.items() if keys)
    return Match(len(shapes), len(nnx.to_flat_state(tensors)), counted, faults)


def _kind_of(given: Mapping[str, Any]) -> str | None:
    """Returns the kind of model whose required fields are all given or left out by habit."""
    for kind, (config_class, _) in MODELS.items():
        needed = {field.name for field in fields(config_class) if field.default is MISSING}
        told = needed - LEFT_OUT[kind].keys()
        if told and told <= given.keys():
            return kind
    return None
