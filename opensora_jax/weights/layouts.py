"""The two published layouts of one MMDiT, and the way between them, tensor by tensor.

Flux has one matrix for queries, keys and values and rotates neighbouring channels; Open-Sora v2 has a matrix each and
rotates the two halves of a head. Putting each head's even channels before its odd ones, in queries, keys and their
norms, turns one rotation into the other, so both layouts compute the same function.
Source: hpcaitech/Open-Sora, `opensora/models/mmdit/math.py` (rearrange_tensor) for the order of channels.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from opensora_jax.config.errors import UserError
from opensora_jax.weights.views import Joined, Rows

FUSED = re.compile(r"(.*_blocks\.\d+\.(?:img_attn\.|txt_attn\.|))(qkv|linear1)\.(weight|bias)$")
FUSED_LORA = re.compile(r"(.*_blocks\.\d+\.(?:img_attn\.|txt_attn\.|))(qkv|linear1)\.(lora_[AB]\.weight)$")
SPLIT = re.compile(r"(.*_blocks\.\d+\.(?:img_attn\.|txt_attn\.|))q_proj\.(weight|bias)$")
PART = re.compile(r"_blocks\.\d+\..*\b(k_proj|v_proj|v_mlp)\.(weight|bias)$")
JOINED = 3  # tensors of Open-Sora's layout in one of Flux's
NORM = re.compile(r"_blocks\..*\.(query_norm|key_norm)\.scale$")


def to_split(checkpoint: Mapping[str, Any], heads: int) -> dict[str, Any]:
    """Returns the Open-Sora v2 state dict of a Flux one with `heads` attention heads; nothing is read yet.

    Raises: UserError when the checkpoint is not in Flux's layout.
    """
    _check_layout(checkpoint, FUSED, "Flux", "qkv")
    split: dict[str, Any] = {}
    for key, tensor in checkpoint.items():
        if match := FUSED.match(key):
            prefix, name, leaf = match.groups()
            split |= _split_rows(tensor, _get(checkpoint, f"{prefix}{name}.weight").shape[1], heads, prefix, name, leaf)
        else:
            split[key] = _norm(key, tensor, evens_first)
    return split


def to_fused(checkpoint: Mapping[str, Any], heads: int) -> dict[str, Any]:
    """Returns the Flux state dict of an Open-Sora v2 one: the inverse of `to_split`.

    Raises: UserError when the checkpoint is not in Open-Sora's layout.
    """
    _check_layout(checkpoint, SPLIT, "Open-Sora v2", "q_proj")
    fused: dict[str, Any] = {}
    for key, tensor in checkpoint.items():
        if match := SPLIT.match(key):
            prefix, leaf = match.groups()
            value = "v_proj" if "attn." in prefix else "v_mlp"
            order = per_head(tensor.shape[0], heads, pairs_again)
            parts = [Rows(_get(checkpoint, f"{prefix}{name}.{leaf}"), order) for name in ("q_proj", "k_proj")]
            fused_name = "qkv" if "attn." in prefix else "linear1"
            fused[f"{prefix}{fused_name}.{leaf}"] = Joined([*parts, _get(checkpoint, f"{prefix}{value}.{leaf}")])
        elif not PART.search(key):
            fused[key] = _norm(key, tensor, pairs_again)
    return fused


def lora_to_split(adapter: Mapping[str, Any], heads: int) -> dict[str, Any]:
    """Returns a LoRA for the Open-Sora v2 layout that does what one for Flux's does; nothing is read yet.

    Its keys are `<module>.lora_A.weight` and `<module>.lora_B.weight`. The parts of a fused layer share one A, and have
    its B's rows each. The way back has no such form: three As are no longer one.
    Raises: UserError when one of the two is missing.
    """
    split: dict[str, Any] = {}
    for key, tensor in adapter.items():
        if match := FUSED_LORA.match(key):
            prefix, name, leaf = match.groups()
            width = _get(adapter, f"{prefix}{name}.lora_A.weight").shape[1]
            rows = _split_rows(_get(adapter, f"{prefix}{name}.lora_B.weight"), width, heads, prefix, name, leaf)
            split |= rows if leaf == "lora_B.weight" else {part: tensor for part, _ in rows}
        else:
            split[key] = tensor
    return split


def evens_first(size: int) -> np.ndarray:
    """Returns 0, 2, 4, ..., 1, 3, 5, ...: where the channels of a head come from when pairs become halves."""
    return np.concatenate([np.arange(0, size, 2), np.arange(1, size, 2)])


def pairs_again(size: int) -> np.ndarray:
    """Returns the inverse of `evens_first`."""
    return np.argsort(evens_first(size))


def per_head(width: int, heads: int, order: Any) -> np.ndarray:
    """Returns the order of all channels when those of each head are put in `order(head size)`."""
    size = width // heads
    return (np.arange(heads)[:, None] * size + order(size)).reshape(-1)


def _split_rows(tensor: Any, width: int, heads: int, prefix: str, name: str, leaf: str) -> Iterator[tuple[str, Any]]:
    order = per_head(width, heads, evens_first)
    value = "v_proj" if name == "qkv" else "v_mlp"
    rest = np.arange(2 * width, tensor.shape[0])
    for part, rows in (("q_proj", order), ("k_proj", width + order), (value, rest)):
        yield f"{prefix}{part}.{leaf}", Rows(tensor, rows)


def _norm(key: str, tensor: Any, order: Any) -> Any:
    return Rows(tensor, order(tensor.shape[0])) if NORM.search(key) else tensor


def _get(checkpoint: Mapping[str, Any], key: str) -> Any:
    if key not in checkpoint:
        raise UserError(f"The checkpoint lacks {key}, which belongs to others that it has; use a whole one.")
    return checkpoint[key]


def _check_layout(checkpoint: Mapping[str, Any], pattern: re.Pattern, layout: str, sign: str) -> None:
    if not any(pattern.match(key) for key in checkpoint):
        raise UserError(f"The checkpoint is not in the layout of {layout}: no key has {sign}; use layout 'same'.")
