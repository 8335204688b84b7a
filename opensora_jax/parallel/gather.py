"""Parameters of which every device holds a part, whole again only while a layer uses them.

Inside `per_device` (sequence.py) a parameter is this device's part. `whole` casts it to the compute dtype and gathers
it over the `fsdp` axis; called by a layer of a scanned stack, that happens in the scan's body, for one layer at a time.
Backwards each device gets the sum of its part alone, by a reduce-scatter in float32 whatever the compute dtype: sums
over hundreds of devices would lose bits in bfloat16, and the gradients are a small part of what a step sends.
Source: ZeRO stage 3 (Rajbhandari et al. 2020, arXiv:1910.02054).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import AbstractMesh, PartitionSpec, get_abstract_mesh
from jax.typing import DTypeLike

from opensora_jax.parallel.rules import param_spec

SPEC = "local_spec"  # metadata of a parameter that is a part: how one layer of it is split


def whole(param: nnx.Variable, dtype: DTypeLike) -> Array:
    """Returns a parameter in `dtype`, gathered if this device holds a part of it."""
    spec = param.get_metadata(SPEC, None)
    return param[...].astype(dtype) if spec is None else _gather(param[...], param.dtype, dtype, spec)


def split_module(
    module: nnx.Module, mesh: AbstractMesh
) -> tuple[list[Array], list[PartitionSpec], Callable[[list[Array]], nnx.Module]]:
    """Returns a module's parameters, how the `fsdp` axis splits each, and what makes a module of a device's parts."""
    graphdef, params = nnx.split(module)
    variables, treedef = jax.tree.flatten(params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    axes = [variable.get_metadata()["axes"] for variable in variables]
    specs = [param_spec(names, v.get_value().shape, mesh) for names, v in zip(axes, variables, strict=True)]
    split = [mesh.shape["fsdp"] > 1 and "fsdp" in spec for spec in specs]
    layers = [PartitionSpec(*spec[len(spec) - len(names) :]) for names, spec in zip(axes, specs, strict=True)]

    def rebuild(parts: list[Array]) -> nnx.Module:
        marked = [
            variable.replace(part, **({SPEC: layer} if is_part else {}))
            for variable, part, layer, is_part in zip(variables, parts, layers, split, strict=True)
        ]
        return nnx.merge(graphdef, jax.tree.unflatten(treedef, marked))

    return [variable.get_value() for variable in variables], [_only(spec, "fsdp") for spec in specs], rebuild


def is_split_along_tensor() -> bool:
    """Returns whether the mesh splits heads and columns of kernels over several devices."""
    return get_abstract_mesh().shape.get("tensor", 1) > 1


def replicated(x: Array) -> Array:
    """Returns an array that all devices along the `tensor` axis hold whole.

    For what is small and multiplies what is large and whole: the compiler would split the large one as the small one
    is, and gather it again in front of the next product.
    """
    return jax.lax.with_sharding_constraint(x, PartitionSpec()) if is_split_along_tensor() else x


def over_tensor(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """Returns `function` run on each device's part along the `tensor` axis; specs name no other axis.

    Collectives over other axes would make the compiler gather what `tensor` splits, were it left to it.
    """
    if not is_split_along_tensor():
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names={"tensor"}, check_vma=False)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(part: Array, held: DTypeLike, dtype: DTypeLike, spec: PartitionSpec) -> Array:
    """Returns a parameter, `held` in one dtype, in another."""
    return _gather_forward(part, held, dtype, spec)[0]


def _gather_forward(part: Array, _: DTypeLike, dtype: DTypeLike, spec: PartitionSpec) -> tuple[Array, None]:
    def gather(part: Array) -> Array:
        return jax.lax.all_gather(part.astype(dtype), "fsdp", axis=spec.index("fsdp"), tiled=True)

    return over_tensor(gather, _only(spec, "tensor"), _only(spec, "tensor"))(part), None


def _gather_backward(held: DTypeLike, _: DTypeLike, spec: PartitionSpec, __: None, gradient: Array) -> tuple[Array]:
    def scatter(gradient: Array) -> Array:
        wide = gradient.astype(jnp.float32)
        return jax.lax.psum_scatter(wide, "fsdp", scatter_dimension=spec.index("fsdp"), tiled=True).astype(held)

    return (over_tensor(scatter, _only(spec, "tensor"), _only(spec, "tensor"))(gradient),)


_gather.defvjp(_gather_forward, _gather_backward)


def _only(spec: PartitionSpec, axis: str) -> PartitionSpec:
    return PartitionSpec(*(name if name == axis else None for name in spec))
