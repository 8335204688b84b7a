"""A LoRA as a folder in the format of PEFT, which other trainers and programs read and write.

`adapter_model.safetensors` holds `base_model.model.<module>.lora_A.weight` [rank, in] and `lora_B.weight` [out, rank]
of every layer under its published name, and `adapter_config.json` says how to use them.
Source: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.experimental import multihost_utils

from opensora_jax.config.errors import UserError
from opensora_jax.config.files import write_json
from opensora_jax.nn.lora import LoRAConfig, is_lora
from opensora_jax.weights.files import open_checkpoint, read_json, save_safetensors
from opensora_jax.weights.layouts import lora_to_split
from opensora_jax.weights.params import published_tensors

PREFIX = "base_model.model."
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEY = re.compile(rf"(?:{re.escape(PREFIX)})?(.+)\.(lora_[AB])(?:\.default)?\.weight$")
ONLY = {  # fields whose other values mean another computation -> the value of ours
    "use_dora": False,
    "use_qalora": False,
    "bias": "none",
    "fan_in_fan_out": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
}


CHANGING = ("pissa", "olora", "corda", "loftq")  # ways to start that take a part out of the weights beneath


@dataclass(frozen=True)
class Adapter:
    """A LoRA in published terms: `<module>.lora_A.weight` and `<module>.lora_B.weight` of each layer."""

    folder: Path
    rank: int
    alpha: float
    tensors: Mapping[str, Any]

    @property
    def modules(self) -> frozenset[str]:
        """The published names of its layers."""
        return frozenset(key.rsplit(".", 2)[0] for key in self.tensors)

    def to_split(self, heads: int) -> "Adapter":
        """Returns this LoRA of a Flux-layout MMDiT for the same one in Open-Sora v2's layout."""
        return replace(self, tensors=lora_to_split(self.tensors, heads))


def read_adapter(folder: str | Path) -> Adapter:
    """Returns the LoRA in a folder; its tensors are read when they are asked for.

    Raises: UserError for a folder that is none, or of a kind that computes something else.
    """
    folder = Path(folder)
    about = read_json(folder / CONFIG)
    if about.get("peft_type") != "LORA":
        raise UserError(f"{folder / CONFIG} describes a {about.get('peft_type')}: only LORA can be read")
    for name, value in ONLY.items():
        if about.get(name) and about[name] != value:
            raise UserError(
                f"{folder / CONFIG} has {name}={about[name]!r}: only {value!r} can be read; merge it in PEFT"
            )
    if str(about.get("init_lora_weights")).lower().startswith(CHANGING):
        raise UserError(
            f"{folder / CONFIG} has init_lora_weights={about['init_lora_weights']!r}, which changed the weights "
            "beneath it: save it with PEFT's path_initial_model_for_weight_conversion, or merge it there"
        )
    try:
        rank, alpha = int(about["r"]), float(about["lora_alpha"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / CONFIG} needs numbers r and lora_alpha ({error!r}); save the LoRA again") from error
    alpha *= math.sqrt(rank) if about.get("use_rslora") else 1  # whose weight is alpha / sqrt(rank)
    return Adapter(folder, rank, alpha, _read_tensors(folder))


def is_adapter(folder: Path) -> bool:
    """Returns whether a folder holds a LoRA, whole: its description is written last."""
    return (folder / CONFIG).is_file()


def write_adapter(folder: Path, model_name: str, params: nnx.State, config: LoRAConfig, base: str | None) -> None:
    """Writes the LoRA among `params` into a folder in PEFT's format; `base` says what model it is for.

    Every process of a run calls it, the first one writes. Raises: ValueError if there is no LoRA among them.
    """
    leaves = [(path, leaf.get_value()) for path, leaf in nnx.to_flat_state(params) if is_lora(path)]
    if not leaves:
        raise ValueError("write_adapter needs the parameters of a LoRA: got none.")
    whole = [(path, multihost_utils.process_allgather(array, tiled=True)) for path, array in leaves]
    if jax.process_index() != 0:
        return
    tensors = published_tensors(model_name, whole)
    folder.mkdir(parents=True, exist_ok=True)
    save_safetensors(folder / FILE, {PREFIX + key: tensor for key, tensor in tensors.items()})
    write_json(folder / CONFIG, _about(config, sorted({key.rsplit(".", 2)[0] for key in tensors}), base))


def _about(config: LoRAConfig, modules: list[str], base: str | None) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if float(config.alpha).is_integer() else config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": modules,  # whole names: each fits its own layer alone
    }


def _read_tensors(folder: Path) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for key, tensor in open_checkpoint(folder).items():
        match = KEY.match(key)
        if match is None:
            raise UserError(f"{folder} holds {key}, which belongs to no LoRA of a linear layer; only those can be read")
        tensors[f"{match[1]}.{match[2]}.weight"] = tensor
    lonely = [key for key in tensors if _other(key) not in tensors]
    if lonely or not tensors:
        raise UserError(f"{folder} lacks {_other(lonely[0]) if lonely else 'all tensors'}; save the LoRA again")
    return tensors


def _other(key: str) -> str:
    return key.replace(".lora_A.", ".lora_#.").replace(".lora_B.", ".lora_A.").replace(".lora_#.", ".lora_B.")
