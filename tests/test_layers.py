"""Imports go one way: this file holds the table behind docs/layout.md and checks it by reading the code."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "opensora_jax"

# folder -> the folders it may import besides itself and config
BELOW_ASSEMBLY = {"weights", "diffusion", "data", "models", "nn", "parallel", "kernels"}
MAY_IMPORT = {
    "commands": BELOW_ASSEMBLY | {"training", "inference", "forecast"},  # the files at the top
    "forecast": BELOW_ASSEMBLY | {"training", "inference"},
    "training": BELOW_ASSEMBLY,
    "inference": BELOW_ASSEMBLY,
    "weights": {"models", "nn", "parallel", "kernels"},
    "diffusion": set(),
    "data": set(),
    "models": {"nn", "parallel", "kernels"},
    "nn": {"parallel", "kernels"},
    "parallel": {"kernels"},
    "kernels": set(),
    "config": set(),
}
ACCELERATOR = {"jax", "jaxlib", "flax", "optax", "orbax"}
FORBIDDEN = {  # folder -> packages of others that it does without
    "data": ACCELERATOR,
    "config": ACCELERATOR,
    "diffusion": ACCELERATOR - {"jax"},
}
NOWHERE = {"torch", "torchvision", "tensorflow", "keras"}
KERNELS_USE = {"jax", "jaxtyping", "numpy", "einops"} | set(sys.stdlib_module_names)
NO_NOUNS = {"util", "utils", "helper", "helpers", "common", "misc"}


def violations(root: Path) -> list[str]:
    """Returns "file:line: what is wrong" for every break of the layout under `root`."""
    found = []
    for path in sorted(root.glob(f"{PACKAGE}/**/*.py")):
        found += _in_file(path, path.relative_to(root))
    return found


def _in_file(path: Path, name: Path) -> Iterator[str]:
    text = path.read_text()
    if not text.strip():
        yield f"{name}:1: the file is empty: remove it, or fill it"
        return
    tree = ast.parse(text, str(name))
    if not ast.get_docstring(tree):
        yield f"{name}:1: the file does not say what it is: give it a docstring"
    for part in (*name.parts[1:-1], name.stem):
        if part in NO_NOUNS:
            yield f"{name}:1: {part!r} names no noun: put its functions where their noun lives"
    for line, module in _imports(tree, name):
        complaint = _complaint(name, module)
        if complaint:
            yield f"{name}:{line}: {complaint}"


def _imports(tree: ast.Module, name: Path) -> Iterator[tuple[int, str]]:
    """Yields (line, module) of every import, those inside functions too; `from a import b` counts as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = name.parts[: len(name.parts) - node.level] if node.level else ()
            base = ".".join((*package, *filter(None, [node.module])))
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def _complaint(name: Path, module: str) -> str | None:
    top, *rest = module.split(".")
    layer = name.parts[1] if len(name.parts) > 2 else "commands"
    if layer not in MAY_IMPORT:
        return f"the folder {layer} has no row in the table of tests/test_layers.py"
    if top in NOWHERE:
        return f"nothing here runs on {top}"
    if top in FORBIDDEN.get(layer, set()):
        return f"{layer} does without {top}"
    if top != PACKAGE:
        return None if layer != "kernels" or top in KERNELS_USE else f"kernels imports jax only, not {top}"
    target = rest[0] if rest else ""
    if target in MAY_IMPORT and target != "commands":
        allowed = MAY_IMPORT[layer] | {layer, "config"}
        return None if target in allowed else f"{layer} may not import {target}, only {_listed(allowed)}"
    return f"{(target or PACKAGE)!r} is a command: nothing imports a command"


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))


def test_every_import_points_down():
    assert not violations(ROOT), "\n" + "\n".join(violations(ROOT))


def test_the_table_itself_points_one_way():
    order = list(MAY_IMPORT)
    for layer, below in MAY_IMPORT.items():
        assert all(order.index(layer) < order.index(name) for name in below), layer


def test_the_layout_page_names_every_folder():
    page = (ROOT / "docs" / "layout.md").read_text()
    assert [layer for layer in MAY_IMPORT if layer not in page] == []


@pytest.mark.parametrize(
    ("file", "code", "complaint"),
    [
        (
            "nn/a.py",
            "import opensora_jax.models.b",
            ":2: nn may not import models, only config, kernels, nn, parallel",
        ),
        ("nn/a.py", "from opensora_jax import training", ":2: nn may not import training"),
        ("nn/a.py", "def f():\n    from ..data import plan", ":3: nn may not import data"),
        ("diffusion/a.py", "from opensora_jax.models import mmdit", ":2: diffusion may not import models"),
        (
            "training/a.py",
            "from opensora_jax.inference import pipeline",
            ":2: training may not import inference",
        ),
        ("data/a.py", "import jax.numpy as jnp", ":2: data does without jax"),
        ("config/a.py", "from flax import nnx", ":2: config does without flax"),
        ("kernels/a.py", "import optax", ":2: kernels imports jax only, not optax"),
        ("models/a.py", "import torch", ":2: nothing here runs on torch"),
        ("train.py", "from opensora_jax import sample", ":2: 'sample' is a command"),
        ("training/a.py", "import opensora_jax.train", ":2: 'train' is a command"),
        ("tools/a.py", "import os", ":2: the folder tools has no row"),
        ("data/utils.py", "import os", ":1: 'utils' names no noun"),
        ("data/common/a.py", "import os", ":1: 'common' names no noun"),
    ],
)
def test_a_break_of_the_layout_is_found_with_its_line(tmp_path, file, code, complaint):
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(f'"""What it is."""\n{code}\n')
    (found,) = violations(tmp_path)
    assert complaint in found
    assert found.startswith(f"{PACKAGE}/{file}:")


@pytest.mark.parametrize(("text", "complaint"), [("", "empty"), ("x = 1\n", "docstring")])
def test_a_file_that_says_nothing_is_found(tmp_path, text, complaint):
    path = tmp_path / PACKAGE / "a.py"
    path.parent.mkdir()
    path.write_text(text)
    (found,) = violations(tmp_path)
    assert complaint in found


def test_what_the_table_allows_passes(tmp_path):
    files = {
        "train.py": "from opensora_jax.training import loop\nfrom opensora_jax.config.command import run",
        "models/a.py": "from opensora_jax.nn.norm import RMSNorm\nimport flax",
        "parallel/a.py": "from ..kernels import attention",
        "kernels/a.py": "import functools\nfrom jax.experimental import pallas",
    }
    for file, code in files.items():
        path = tmp_path / PACKAGE / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""What it is."""\n{code}\n')
    assert violations(tmp_path) == []
