"""Parameters in and out: published tensors to shards of a mesh and back, one at a time.

Of each tensor only the parts that this host's devices hold are read, into buffers that the devices then own, so that
no host needs the memory of a second copy.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import SingleDeviceSharding
from jax.typing import DTypeLike
from tqdm import tqdm

from opensora_jax.config.errors import UserError
from opensora_jax.weights.rename import NAMES, Names, Path, Weight, first_of, is_ignored, published_shapes, weight_of

Initial = Callable[[set[Path]], Mapping[Path, jax.Array]]


def load_params(
    model_name: str, checkpoint: Mapping[str, Any], params: nnx.State, *, initial: Initial | None = None
) -> nnx.State:
    """Returns `params` with the values of a published state dict, in the dtypes and shardings that `params` has.

    `params` may be abstract (`nnx.eval_shape`). Tensors are read one by one, and of each only the parts that this
    host's devices hold. With `initial`, which returns fresh values of the parameters at given paths, keys that are
    missing, unexpected or misshapen are logged and left out, and what is left without a value gets a fresh one.
    Raises: UserError naming such keys without `initial`.
    """
    names = NAMES[model_name]
    checkpoint = _untie(names, checkpoint)
    shapes = published_shapes(model_name, params)
    absent = _check(model_name, checkpoint, shapes, partial=initial is not None)
    weights = {path: (weight_of(model_name, path, leaf.shape), leaf) for path, leaf in nnx.to_flat_state(params)}
    fresh = {path for path, (weight, _) in weights.items() if absent.intersection(weight.keys)}
    values = initial(fresh) if initial is not None and fresh else {}
    loaded = {}
    for path, (weight, leaf) in tqdm(weights.items(), desc=f"load {model_name}", unit="tensor", leave=False):
        present = [key not in absent for key in weight.keys]
        if path in values:
            loaded[path] = leaf.replace(_mix(checkpoint, weight, leaf, present, values[path]))
        else:
            loaded[path] = leaf.replace(_assemble(checkpoint, weight, leaf, present))
    return nnx.from_flat_state(loaded)


def with_stored_dtypes(model_name: str, checkpoint: Mapping[str, Any], params: nnx.State) -> nnx.State:
    """Returns abstract `params` with the dtypes of the checkpoint, in which `load_params` then changes no bit."""

    def stored(path: Path, leaf: nnx.Variable) -> nnx.Variable:
        keys = weight_of(model_name, path, leaf.shape).keys
        dtypes = {np.dtype(checkpoint[key].dtype) for key in keys if key in checkpoint} or {leaf.dtype}
        value = leaf.get_value()
        return leaf.replace(jax.ShapeDtypeStruct(value.shape, jnp.result_type(*dtypes), sharding=value.sharding))

    return nnx.from_flat_state([(path, stored(path, leaf)) for path, leaf in nnx.to_flat_state(params)])


def published_tensors(model_name: str, leaves: Iterable[tuple[Path, Any]]) -> dict[str, Any]:
    """Returns the published state dict of parameters, given as (path, array): the inverse of `load_params`.

    An array is anything with `shape`, `dtype` and an index; a tensor of the result has `shape` and `dtype`, and reads
    its array when `np.asarray` is called on it.
    """
    names = NAMES[model_name]
    tensors: dict[str, Any] = {}
    for path, array in leaves:
        weight = weight_of(model_name, path, array.shape)
        tensors |= {key: Layer(array, i if weight.stacked else None, weight) for i, key in enumerate(weight.keys)}
    return tensors | {copy: tensors[original] for copy, original in names.tied}


def export_params(model_name: str, params: nnx.State) -> dict[str, np.ndarray]:
    """Returns the published state dict of `params`, read into memory."""
    leaves = ((path, variable.get_value()) for path, variable in nnx.to_flat_state(params))
    return {key: np.asarray(tensor) for key, tensor in published_tensors(model_name, leaves).items()}


@dataclass(frozen=True, eq=False)
class Layer:
    """One of our arrays, or one layer of a stack, as the published tensor that it becomes."""

    array: Any
    layer: int | None
    weight: Weight

    @property
    def shape(self) -> tuple[int, ...]:
        """The published shape."""
        return self.weight.shape

    @property
    def dtype(self) -> DTypeLike:
        """The dtype of our array."""
        return self.array.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.asarray(self)[index]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        value = np.asarray(self.array if self.layer is None else self.array[self.layer])
        return np.array(value.transpose(np.argsort(self.weight.order)), dtype, order="C")


def _assemble(checkpoint: Mapping[str, Any], weight: Weight, leaf: nnx.Variable, present: list[bool]) -> jax.Array:
    """Returns one parameter, each device's part read from the file; layers that are not present are zeros."""
    target = leaf.get_value()

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        layers, *axes = index if weight.stacked else (slice(None), *index)
        ours = target.shape[1:] if weight.stacked else target.shape
        chosen = range(len(weight.keys))[layers]
        size = (len(chosen), *(len(range(n)[s]) for n, s in zip(ours, axes, strict=True)))
        part = aligned_zeros(size, target.dtype)
        published = tuple(axes[i] for i in np.argsort(weight.order))
        for place, layer in zip(part, chosen, strict=True):
            if present[layer]:
                place[...] = np.asarray(checkpoint[weight.keys[layer]][published]).transpose(weight.order)
        return part if weight.stacked else part[0]

    sharding = target.sharding or SingleDeviceSharding(jax.local_devices()[0])
    return jax.make_array_from_callback(target.shape, sharding, read)


def aligned_zeros(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """Returns zeros at an address that JAX on a CPU takes as it is, where it would copy others."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _mix(
    checkpoint: Mapping[str, Any], weight: Weight, leaf: nnx.Variable, present: list[bool], fresh: jax.Array
) -> jax.Array:
    """Returns a parameter whose layers come from the checkpoint where they are present, else from `fresh`."""
    if not any(present):
        return fresh
    mask = np.asarray(present).reshape(-1, *[1] * (fresh.ndim - 1))
    return jnp.where(mask, _assemble(checkpoint, weight, leaf, present), fresh)


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


def _check(
    model_name: str, checkpoint: Mapping[str, Any], wanted: dict[str, tuple[int, ...]], *, partial: bool
) -> set[str]:
    """Returns the wanted keys that the checkpoint cannot fill: none, unless `partial`. Raises: UserError."""
    misshapen = {
        key: f"{key} is {tuple(checkpoint[key].shape)} where the model has {shape}"
        for key, shape in wanted.items()
        if key in checkpoint and tuple(checkpoint[key].shape) != shape
    }
    found = {
        "missing": [key for key in wanted if key not in checkpoint],
        "unexpected": [key for key in checkpoint if key not in wanted and not is_ignored(model_name, key)],
        "wrong shape": list(misshapen.values()),
    }
    faults = {fault: keys for fault, keys in found.items() if keys}
    absent = {*found["missing"], *misshapen}
    if partial and len(absent) < len(wanted):
        for fault, keys in faults.items():
            logging.warning("%s in the checkpoint: %s", fault, ", ".join(keys))
        if absent:
            logging.warning("left as initialised: %d of %d tensors of the %s", len(absent), len(wanted), model_name)
        return absent
    if faults:
        listed = "; ".join(f"{fault}: {first_of(keys)}" for fault, keys in faults.items())
        raise UserError(
            f"The checkpoint does not fit this {model_name} ({listed}); use its own config or other weights, "
            "rename its keys (rename_keys), say what layout it has (layout), or load what fits (strict_load=False)."
        )
    return set()
