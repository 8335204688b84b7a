"""Published torch state dicts to NNX parameters and back, by one mechanical rule and a short table per model.

The rule: parts of the path joined by dots; `kernel`, `scale` and `table` are `weight`, and kernels have
output and input axes first ([out, in], [out, in, t, h, w]); a scanned stack `x.blocks.rest` is one tensor
`x.{i}.rest` per layer.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from opensora_jax.config.errors import UserError

Path = tuple[Any, ...]  # of a parameter in its module


@dataclass(frozen=True)
class Names:
    """Where a model's published names leave the rule."""

    exceptions: tuple[tuple[str, str], ...]  # (pattern in the mechanical name, published form), applied in order
    tied: tuple[tuple[str, str], ...] = ()  # (published copy, published original): a copy may be absent
    ignored: str | None = None  # pattern of published keys of parts and constants that we do not have


NAMES = {
    "opensora_vae": Names(
        exceptions=((r"^spatial_vae\.", "spatial_vae.module."), (r"\.to_out\.", ".to_out.0.")),
        ignored=r"^(scale|shift)$",
    ),
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
    "dc_ae": Names(exceptions=()),
    "discriminator": Names(exceptions=(), ignored=r"\.num_batches_tracked$"),
    "flux_ae": Names(
        exceptions=(
            (r"\.(down|up)_blocks\.", r".\1."),
            (r"\.(down|up)samplers\.0\.", r".\1sample."),
            (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
            (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
            (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
            (r"\.resnets\.", ".block."),
            (r"\.conv_shortcut\.", ".nin_shortcut."),
            (r"\.(?:group|conv)_(norm)", r".\1"),
            (r"\.to_([qkv])\.", r".\1."),
            (r"\.to_out\.", ".proj_out."),
        )
    ),
    "hunyuan_vae": Names(exceptions=((r"\.to_out\.", ".to_out.0."),)),
    "lpips": Names(exceptions=((r"^lins\.(\d)\.", r"lin\1.model.1."),), ignored=r"^(scaling_layer|lins)\."),
    "mmdit": Names(
        exceptions=(
            (r"_mlp\.in_layer\.", "_mlp.0."),
            (r"_mlp\.out_layer\.", "_mlp.2."),
            (r"\.adaLN_modulation\.lin\.", ".adaLN_modulation.1."),
            (r"\.(query_norm|key_norm)\.weight$", r".\1.scale"),
        )
    ),
}


class Weight(NamedTuple):
    """One of our parameters in published terms."""

    keys: tuple[str, ...]  # one, or one per layer of a stack
    stacked: bool
    order: tuple[int, ...]  # published.transpose(order) is our layout
    shape: tuple[int, ...]  # published


def weight_of(model_name: str, path: Path, shape: tuple[int, ...]) -> Weight:
    """Returns what the parameter at `path` with `shape` is called in published weights, and how it lies there."""
    *parts, leaf = map(str, path)
    stacked = "blocks" in parts
    depth, shape = (shape[0], shape[1:]) if stacked else (1, shape)
    name = ".".join("{i}" if part == "blocks" else part for part in parts)
    name = f"{name}.{'weight' if leaf in ('kernel', 'scale', 'table') else leaf}"
    for pattern, published in NAMES[model_name].exceptions:
        name = re.sub(pattern, published, name)
    axes = range(len(shape))
    order = (*axes[2:], 1, 0) if leaf == "kernel" else tuple(axes)
    keys = tuple(name.replace("{i}", str(i)) for i in range(depth))
    return Weight(keys, stacked, order, tuple(shape[i] for i in np.argsort(order)))


def published_shapes(model_name: str, params: nnx.State) -> dict[str, tuple[int, ...]]:
    """Returns key -> shape of the state dict that `load_params` wants, copies of tied tensors left out."""
    return dict(parameter_keys(model_name, params))


def parameter_keys(model_name: str, params: nnx.State) -> list[tuple[str, tuple[int, ...]]]:
    """Returns (published key, shape) of every parameter, of every layer where layers are stacked."""
    weights = (weight_of(model_name, path, leaf.shape) for path, leaf in nnx.to_flat_state(params))
    return [(key, weight.shape) for weight in weights for key in weight.keys]


def rename_keys(checkpoint: Mapping[str, Any], given: Sequence[str]) -> dict[str, Any]:
    """Returns the checkpoint with the first OLD of `given` ("OLD:NEW") that occurs in a key replaced there by its NEW.

    Raises: UserError for what is no OLD:NEW, and for one that occurs in no key or makes two keys one.
    """
    renames = dict(map(parse_rename, given))
    renamed: dict[str, Any] = {}
    unused = set(renames)
    for key, tensor in checkpoint.items():
        old = next((old for old in renames if old in key), None)
        unused.discard(old or "")
        name = key if old is None else key.replace(old, renames[old])
        if name in renamed:
            raise UserError(f"rename_keys makes {name} of two keys, {key} is one; rename one of them, or neither.")
        renamed[name] = tensor
    if unused:
        raise UserError(f"rename_keys: no key has {min(unused)!r}; the keys are like {first_of(list(checkpoint))}.")
    return renamed


def parse_rename(given: str) -> tuple[str, str]:
    """Returns OLD and NEW of "OLD:NEW". Raises: UserError for anything else."""
    old, separator, new = given.partition(":")
    if not separator or not old:
        raise UserError(f"a rename is OLD:NEW, the part of a key and what replaces it: got {given!r}")
    return old, new


def is_ignored(model_name: str, key: str) -> bool:
    """Returns whether a published key belongs to a part that we do not have."""
    ignored = NAMES[model_name].ignored
    return ignored is not None and re.search(ignored, key) is not None


def first_of(keys: list[str], count: int = 3) -> str:
    """Returns the first few keys and how many more there are."""
    more = f" and {len(keys) - count} more" if len(keys) > count else ""
    return ", ".join(keys[:count]) + more
