"""Published torch state dicts to NNX parameters and back, by one mechanical rule and a short table per model.

The rule: parts of the path joined by dots; `kernel`, `scale` and `table` are `weight`, and kernels have
output and input axes first ([out, in], [out, in, t, h, w]); a scanned stack `x.blocks.rest` is one tensor
`x.{i}.rest` per layer.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from opensora_jax.config.errors import UserError


@dataclass(frozen=True)
class Names:
    """Where a model's published names leave the rule."""

    exceptions: tuple[tuple[str, str], ...]  # (pattern in the mechanical name, published form), applied in order
    tied: tuple[tuple[str, str], ...] = ()  # (published copy, published original): a copy may be absent
    ignored: str | None = None  # pattern of published keys of parts that we do not have


NAMES = {
    "t5": Names(
        exceptions=(
            (r"^(block|final_layer_norm)\.", r"encoder.\1."),
            (r"^relative_attention_bias", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"),
            (r"\.attention\.", ".layer.0."),
            (r"\.feed_forward\.", ".layer.1."),
            (r"\.([qkvo])\.weight$", r".SelfAttention.\1.weight"),
            (r"\.(wi_0|wi_1|wo)\.weight$", r".DenseReluDense.\1.weight"),
        ),
        tied=(("encoder.embed_tokens.weight", "shared.weight"),),
        ignored=r"^(decoder|lm_head)\.",
    ),
    "clip": Names(
        exceptions=(
            (r"^(token_embedding|position_embedding)\.", r"embeddings.\1."),
            (r"^layers\.", "encoder.layers."),
            (r"^", "text_model."),
        ),
        ignored=r"^(vision_model|visual_projection|text_projection)\.|^logit_scale$|\.position_ids$",
    ),
    "hunyuan_vae": Names(exceptions=((r"\.to_out\.", ".to_out.0."),)),
    "mmdit": Names(
        exceptions=(
            (r"_mlp\.in_layer\.", "_mlp.0."),
            (r"_mlp\.out_layer\.", "_mlp.2."),
            (r"\.adaLN_modulation\.lin\.", ".adaLN_modulation.1."),
            (r"\.(query_norm|key_norm)\.weight$", r".\1.scale"),
        )
    ),
}


def load_params(model_name: str, checkpoint: Mapping[str, Any], params: nnx.State) -> nnx.State:
    """Returns `params` with the values of a published state dict, in the dtypes that `params` has.

    `params` may be abstract (`nnx.eval_shape`). Raises: UserError for keys missing, unexpected or misshapen.
    """
    names = NAMES[model_name]
    checkpoint = _untie(names, checkpoint)
    _check(model_name, checkpoint, published_shapes(model_name, params))
    loaded = {
        path: variable.replace(_read(checkpoint, _weight(names, path, variable.shape), variable.dtype))
        for path, variable in nnx.to_flat_state(params)
    }
    return nnx.from_flat_state(loaded)


def published_shapes(model_name: str, params: nnx.State) -> dict[str, tuple[int, ...]]:
    """Returns key -> shape of the state dict that `load_params` wants, copies of tied tensors left out."""
    weights = (_weight(NAMES[model_name], path, leaf.shape) for path, leaf in nnx.to_flat_state(params))
    return {key: weight.shape for weight in weights for key in weight.keys}


def export_params(model_name: str, params: nnx.State) -> dict[str, np.ndarray]:
    """Returns the published state dict of `params`: the inverse of `load_params`."""
    names = NAMES[model_name]
    tensors: dict[str, np.ndarray] = {}
    for path, variable in nnx.to_flat_state(params):
        weight = _weight(names, path, variable.shape)
        value = np.asarray(variable[...])
        layers = value if weight.stacked else [value]
        tensors |= {
            key: np.array(layer.transpose(np.argsort(weight.order)), order="C")
            for key, layer in zip(weight.keys, layers, strict=True)
        }
    return tensors | {copy: tensors[original] for copy, original in names.tied}


class _Weight(NamedTuple):
    """One of our parameters in published terms."""

    keys: tuple[str, ...]  # one, or one per layer of a stack
    stacked: bool
    order: tuple[int, ...]  # published.transpose(order) is our layout
    shape: tuple[int, ...]  # published


def _weight(names: Names, path: tuple[Any, ...], shape: tuple[int, ...]) -> _Weight:
    *parts, leaf = map(str, path)
    stacked = "blocks" in parts
    depth, shape = (shape[0], shape[1:]) if stacked else (1, shape)
    name = ".".join("{i}" if part == "blocks" else part for part in parts)
    name = f"{name}.{'weight' if leaf in ('kernel', 'scale', 'table') else leaf}"
    for pattern, published in names.exceptions:
        name = re.sub(pattern, published, name)
    axes = range(len(shape))
    order = (*axes[2:], 1, 0) if leaf == "kernel" else tuple(axes)
    keys = tuple(name.replace("{i}", str(i)) for i in range(depth))
    return _Weight(keys, stacked, order, tuple(shape[i] for i in np.argsort(order)))


def _read(checkpoint: Mapping[str, Any], weight: _Weight, dtype: DTypeLike) -> jnp.ndarray:
    ours = tuple(weight.shape[i] for i in weight.order)
    value = np.empty((len(weight.keys), *ours), dtype)
    for layer, key in zip(value, weight.keys, strict=True):
        layer[...] = np.asarray(checkpoint[key]).transpose(weight.order)
    return jnp.asarray(value if weight.stacked else value[0])


def _untie(names: Names, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the checkpoint without copies; a copy that stands alone takes the original's name."""
    kept = dict(checkpoint)
    for copy, original in names.tied:
        if copy in kept:
            value = kept.pop(copy)
            if not np.array_equal(np.asarray(value), np.asarray(kept.setdefault(original, value))):
                raise UserError(
                    f"{copy} and {original} must be equal and differ; use an unchanged published checkpoint."
                )
    return kept


def _check(model_name: str, checkpoint: Mapping[str, Any], wanted: dict[str, tuple[int, ...]]) -> None:
    ignored = NAMES[model_name].ignored
    found = {
        "missing": [key for key in wanted if key not in checkpoint],
        "unexpected": [key for key in checkpoint if key not in wanted and not (ignored and re.search(ignored, key))],
        "wrong shape": [
            f"{key} is {tuple(checkpoint[key].shape)} where the model has {shape}"
            for key, shape in wanted.items()
            if key in checkpoint and tuple(checkpoint[key].shape) != shape
        ],
    }
    faults = "; ".join(f"{fault}: {_first(keys)}" for fault, keys in found.items() if keys)
    if faults:
        raise UserError(
            f"The checkpoint does not fit this {model_name} ({faults}); use its own config, or other weights."
        )


def _first(keys: list[str], count: int = 3) -> str:
    more = f" and {len(keys) - count} more" if len(keys) > count else ""
    return ", ".join(keys[:count]) + more
