"""LoRAs of published models: where they go by name, what they start from, and their place in the model's weights.

The rule for published names unstacks scanned layers for a LoRA as it does for whole models, since its two matrices lie
where the kernel of a layer lies.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from opensora_jax.config.errors import UserError
from opensora_jax.nn.lora import LoRAConfig, add_lora, all_but_lora, is_lora, linear_layers, merge_lora
from opensora_jax.parallel.rules import param_shardings
from opensora_jax.weights.adapter import Adapter, read_adapter
from opensora_jax.weights.choice import choose_layers, choose_parameters, layer_names
from opensora_jax.weights.params import load_params
from opensora_jax.weights.rename import Path, first_of, published_shapes

Make = Callable[[], nnx.Module]
Read = Callable[[], nnx.State]


def with_lora(make_model: Make, model_name: str, config: LoRAConfig, seed: int) -> Make:
    """Returns what makes the model with a LoRA at each layer that the config names. Raises: UserError for bad names."""
    layers = linear_layers(nnx.eval_shape(make_model))
    paths = choose_layers(model_name, layers, config.targets, "config.lora.targets")

    def make() -> nnx.Module:
        model = make_model()
        add_lora(model, paths, config.rank, config.alpha, rngs=nnx.Rngs(seed))
        return model

    return make


def frozen_parameters(
    model_name: str, freeze: tuple[str, ...], lora: LoRAConfig | None
) -> Callable[[nnx.State], frozenset[Path]]:
    """Returns which parameters of a model do not learn: those that `freeze` names, or all but those of a LoRA.

    Raises: UserError when both are given; what is returned raises one for names that fit nothing, or everything.
    """
    if lora is not None:
        if freeze:
            raise UserError("config.lora freezes all else: set config.optim.freeze=() or config.lora=None")
        return all_but_lora

    def chosen(params: nnx.State) -> frozenset[Path]:
        paths = choose_parameters(model_name, params, freeze, "config.optim.freeze")
        if len(paths) == len(nnx.to_flat_state(params)):
            raise UserError(f"config.optim.freeze: {', '.join(freeze)} leave nothing to learn; name fewer parameters")
        return paths

    return chosen


def base_and_lora(base: Read | None, model_name: str, config: LoRAConfig, mesh: Mesh) -> Read:
    """Returns what reads the weights that a LoRA is trained from: the model's, and the LoRA's if it names a folder.

    Raises: UserError without weights of the model, or for a LoRA of another rank or alpha; what is returned raises one
    for layers that the model lacks or the config does not name.
    """
    if base is None:
        raise UserError("config.lora is trained beside weights that exist: set config.model.from_pretrained")
    if config.from_pretrained is None:
        return base
    adapter = read_adapter(config.from_pretrained)
    if (adapter.rank, adapter.alpha) != (config.rank, config.alpha):
        raise UserError(
            f"{adapter.folder} has rank {adapter.rank} and alpha {adapter.alpha:g}: got config.lora.rank={config.rank} "
            f"and config.lora.alpha={config.alpha:g}; set both to its own"
        )

    def read() -> nnx.State:
        params = base()
        found = adapter_params(model_name, adapter, params, mesh)
        shapes = {path: leaf.shape for path, leaf in _kernels(params).items()}
        chosen = choose_layers(model_name, shapes, config.targets, "config.lora.targets")
        if extra := {path[:-2] for path, _ in nnx.to_flat_state(found)} - chosen:
            names = sorted(names[0] for path, names in layer_names(model_name, shapes).items() if path in extra)
            raise UserError(
                f"{adapter.folder} has layers that config.lora.targets leaves out: {first_of(names)}; add them"
            )
        return nnx.merge_state(params, found)

    return read


def merge_adapter(model_name: str, params: nnx.State, adapter: Adapter, mesh: Mesh) -> nnx.State:
    """Returns the weights of the model that computes what `params` and the adapter do together, in their dtypes.

    The memory of `params` is used for the result. Raises: UserError for an adapter that does not fit.
    """
    found = adapter_params(model_name, adapter, params, mesh)
    merge = jax.jit(
        lambda base, lora: merge_lora(nnx.merge_state(base, lora), adapter.alpha),
        donate_argnums=0,
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, params),
    )
    return merge(params, found)


def adapter_params(model_name: str, adapter: Adapter, params: nnx.State, mesh: Mesh) -> nnx.State:
    """Returns an adapter's parameters for the model of `params` (arrays may be abstract), sharded over the mesh.

    Layers of a stack that the adapter lacks are zeros, which do nothing. Raises: UserError for one that does not fit.
    """
    kernels = _kernels(params)
    names = layer_names(model_name, {path: leaf.shape for path, leaf in kernels.items()})
    used = {path: layers for path, layers in names.items() if adapter.modules.intersection(layers)}
    needed = {layer for layers in used.values() for layer in layers}
    if strange := sorted(adapter.modules - needed):
        raise UserError(
            f"{adapter.folder} has layers that this {model_name} lacks: {first_of(strange)}; "
            "use the model it was made for, or the other layout"
        )
    matrices = [matrix for path in used for matrix in _matrices(path, kernels[path], adapter.rank)]
    plain = nnx.from_flat_state(matrices)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), plain, param_shardings(plain, mesh)
    )
    absent = {key: shape for key, shape in published_shapes(model_name, abstract).items() if key not in adapter.tensors}
    zeros = {key: np.broadcast_to(np.float32(0), shape) for key, shape in absent.items()}
    return load_params(model_name, dict(adapter.tensors) | zeros, abstract)


def _kernels(params: nnx.State) -> dict[Path, nnx.Variable]:
    """Returns path of the layer -> kernel, without those of convolutions: a stack adds one axis to two."""
    flat = ((path, leaf) for path, leaf in nnx.to_flat_state(params) if path[-1] == "kernel" and not is_lora(path))
    return {path[:-1]: leaf for path, leaf in flat if leaf.ndim == 2 + ("blocks" in path)}


def _matrices(path: Path, kernel: nnx.Variable, rank: int) -> Iterator[tuple[Path, nnx.Variable]]:
    """Yields the two matrices of a layer's LoRA, as float32 shapes with their logical axes."""
    *layers, inputs, outputs = kernel.shape
    in_axis, out_axis = kernel.get_metadata()["axes"]
    for name, shape, axes in (
        ("lora_A", (*layers, inputs, rank), (in_axis, None)),
        ("lora_B", (*layers, rank, outputs), (None, out_axis)),
    ):
        yield (*path, name, "kernel"), nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), axes=axes)
