"""LoRA: the product of two thin matrices beside a linear layer, which alone learn while the layer stays as it is.

The layer itself is replaced, not its kernel: a sum of both would be a second copy of every kernel, and its gradient a
third. So the kernel needs no gradient at all, and in a scanned stack the thin matrices lie stacked like everything
else: rematerialisation, sharding and casts treat them alike, and models do not change.
Source: Hu et al. 2021 (arXiv:2106.09685); names and initial values are those of PEFT.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from opensora_jax.nn.linear import Linear, zeros

Path = tuple[Any, ...]  # of a module or a parameter in a model
PARTS = ("lora_A", "lora_B")


@dataclass(frozen=True)
class LoRAConfig:
    """`rank` columns for each layer that `targets` names, their product weighted by `alpha / rank`."""

    rank: int
    alpha: float
    targets: tuple[str, ...]  # published names of linear layers, or of modules that hold them; "*" is any text
    from_pretrained: str | None  # a folder in PEFT's format to start from

    def __post_init__(self):
        """Checks that there is something to learn."""
        if self.rank < 1:
            raise ValueError(f"rank is at least 1: got {self.rank}.")
        if not self.targets:
            raise ValueError("targets is empty: name the layers that get a LoRA, or set the section to None.")


class LoRALinear(Linear):
    """Returns `base(x) + alpha / rank * lora_B(lora_A(x))`: equal to `base` at the start, where lora_B is zero."""

    is_kernel_all = False

    def __init__(self, base: Linear, rank: int, alpha: float | int, *, rngs: nnx.Rngs):
        self.dtype, self.kernel, self.bias = base.dtype, base.kernel, base.bias
        self.scale = alpha / rank
        *layers, inputs, outputs = base.kernel.shape
        in_axis, out_axis = base.kernel.get_metadata()["axes"]

        def make(rngs: nnx.Rngs) -> tuple[Linear, Linear]:
            down = Linear(inputs, rank, (in_axis, None), bias=False, dtype=base.dtype, rngs=rngs)
            up_axes = (None, out_axis)
            return down, Linear(rank, outputs, up_axes, bias=False, kernel_init=zeros, dtype=base.dtype, rngs=rngs)

        if layers:
            make = nnx.split_rngs(splits=layers[0])(nnx.vmap(make, axis_size=layers[0]))
        self.lora_A, self.lora_B = make(rngs)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B E"]:
        return super().__call__(x) + self.scale * self.lora_B(self.lora_A(x))


def linear_layers(model: nnx.Module) -> dict[Path, tuple[int, ...]]:
    """Returns path -> shape of the kernel of every linear layer; scanned ones have a leading axis of layers."""
    return {path: module.kernel.shape for path, module in nnx.iter_modules(model) if isinstance(module, Linear)}


def add_lora(model: nnx.Module, paths: Collection[Path], rank: int, alpha: float | int, *, rngs: nnx.Rngs) -> None:
    """Gives the linear layers at `paths` a LoRA each; the paths of all other parameters stay the same."""
    for *above, name in sorted(paths, key=str):
        parent: Any = reduce(_child, above, model)
        layer = LoRALinear(_child(parent, name), rank, alpha, rngs=rngs)
        if isinstance(name, int):  # in a list
            parent[name] = layer
        else:
            setattr(parent, name, layer)


def _child(module: Any, name: str | int) -> Any:
    return module[name] if isinstance(name, int) else getattr(module, name)


def is_lora(path: Path) -> bool:
    """Says whether a parameter belongs to a LoRA."""
    return len(path) > 1 and path[-2] in PARTS


def all_but_lora(params: nnx.State) -> frozenset[Path]:
    """Returns the paths of the parameters that stay as they are while LoRAs learn."""
    return frozenset(path for path, _ in nnx.to_flat_state(params) if not is_lora(path))


def merge_lora(params: nnx.State, alpha: float | int) -> nnx.State:
    """Returns the parameters of the model without LoRA that computes the same, its kernels in their own dtype.

    Source: `merge_and_unload` of PEFT.
    """
    flat = dict(nnx.to_flat_state(params))
    merged = {path: leaf for path, leaf in flat.items() if not is_lora(path)}
    for path, kernel in merged.items():
        down, up = (flat.get((*path[:-1], part, "kernel")) for part in PARTS)
        if path[-1] == "kernel" and down is not None and up is not None:
            scale = alpha / down.shape[-1]
            product = jnp.matmul(down[...], up[...], precision=jax.lax.Precision.HIGHEST)
            merged[path] = kernel.replace((kernel[...] + scale * product).astype(kernel.dtype))
    return nnx.from_flat_state(merged)
