"""Choosing parameters and layers by their published names: what is frozen, what gets a LoRA.

A pattern names a parameter or a module that holds it, from the start of the name: `txt_in`, `single_blocks.*.linear2`,
`*.bias`. "*" stands for any text, "?" for one character, "[0-4]" for one of several.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from flax import nnx

from opensora_jax.config.errors import UserError
from opensora_jax.weights.rename import Path, weight_of


def choose(names: Mapping[Path, Sequence[str]], patterns: Iterable[str], where: str) -> frozenset[Path]:
    """Returns the paths whose published names the patterns match; several names are the layers of a scanned stack.

    Raises: UserError for a pattern that matches nothing, or when some layers of a stack match and others do not.
    """
    patterns, modules = tuple(patterns), {path: [_prefixes(name) for name in some] for path, some in names.items()}
    for pattern in patterns:
        if not any(_matches(layer, (pattern,)) for layers in modules.values() for layer in layers):
            raise UserError(f"{where}: {pattern!r} names nothing here; {_near(pattern, names)}")
    chosen = {path: [_matches(layer, patterns) for layer in layers] for path, layers in modules.items()}
    for path, layers in chosen.items():
        if any(layers) and not all(layers):
            raise UserError(
                f"{where}: {', '.join(patterns)} name {sum(layers)} of the {len(layers)} layers of "
                f"{_generic(names[path])}, which are stored as one: name all of them, with * for their number"
            )
    return frozenset(path for path, layers in chosen.items() if all(layers))


def choose_parameters(model_name: str, params: nnx.State, patterns: Iterable[str], where: str) -> frozenset[Path]:
    """Returns the paths of the parameters that the patterns name. Raises: UserError as `choose`."""
    names = {path: weight_of(model_name, path, leaf.shape).keys for path, leaf in nnx.to_flat_state(params)}
    return choose(names, patterns, where)


def choose_layers(
    model_name: str, kernels: Mapping[Path, tuple[int, ...]], patterns: Iterable[str], where: str
) -> frozenset[Path]:
    """Returns the paths of the layers, given with their kernels' shapes, that the patterns name. Raises: UserError."""
    return choose(layer_names(model_name, kernels), patterns, where)


def layer_names(model_name: str, kernels: Mapping[Path, tuple[int, ...]]) -> dict[Path, tuple[str, ...]]:
    """Returns path -> published names of layers (several for a scanned stack), given with their kernels' shapes."""
    weights = {path: weight_of(model_name, (*path, "kernel"), shape) for path, shape in kernels.items()}
    return {path: tuple(key.removesuffix(".weight") for key in weight.keys) for path, weight in weights.items()}


def _prefixes(name: str) -> list[str]:
    """Returns a name and those of all modules around it."""
    parts = name.split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


def _matches(prefixes: list[str], patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(prefix, pattern) for pattern in patterns for prefix in prefixes)


def _generic(layers: Sequence[str]) -> str:
    """Returns the name of a stack: that of its first layer with * for the number."""
    return layers[0].replace(".0.", ".*.", 1) if len(layers) > 1 else layers[0]


def _near(pattern: str, names: Mapping[Path, Sequence[str]]) -> str:
    known = {prefix for layers in names.values() for prefix in _prefixes(_generic(layers))}
    near = difflib.get_close_matches(pattern, sorted(known), n=3, cutoff=0.5)
    return (
        f"near it are {', '.join(near)}" if near else f"there are {', '.join(sorted(n for n in known if '.' not in n))}"
    )
