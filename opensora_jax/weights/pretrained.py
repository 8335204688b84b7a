"""Models ready to use, from the workdirs of training runs: the network of a config section with its weights.

A workdir holds Orbax checkpoints whose metadata names the network they belong to, so a section that asks for another
one is refused with the fields that differ.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from opensora_jax.config.build import build
from opensora_jax.config.errors import UserError
from opensora_jax.models.hunyuan_vae import HunyuanVAE, HunyuanVAEConfig
from opensora_jax.models.mmdit import MMDiT, MMDiTConfig
from opensora_jax.parallel.rules import param_shardings

Section = Mapping[str, Any]
Kinds = dict[str, tuple[type, type]]

AUTOENCODERS: Kinds = {"hunyuan_vae": (HunyuanVAEConfig, HunyuanVAE)}
DENOISERS: Kinds = {"mmdit": (MMDiTConfig, MMDiT)}
MODELS = AUTOENCODERS | DENOISERS
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
LATENT_FIELDS = ("scale_factor", "shift_factor")  # measured after training
FREE_FIELDS = (*LATENT_FIELDS, "grad_ckpt_settings")  # the same weights serve all values, so they are not compared


def parse_dtype(name: str) -> DTypeLike:
    """Returns the dtype that models compute in.

    Raises: UserError for a name that is not one.
    """
    if name not in DTYPES:
        raise UserError(f"dtype is one of {', '.join(DTYPES)}: got {name!r}")
    return DTYPES[name]


def parse_model(section: Section, kinds: Kinds, where: str) -> tuple[type, Any]:
    """Returns the module class and the config of a section `{type, from_pretrained, <fields>}`.

    Raises: UserError for an unknown type or a field that does not fit it.
    """
    options = dict(section)
    kind = options.pop("type", None)
    options.pop("from_pretrained", None)
    if kind not in kinds:
        raise UserError(f"{where}.type is one of {', '.join(kinds)}: got {kind!r}")
    config_class, module = kinds[kind]
    return module, build(config_class, options, where)


def describe(kind: str, config: Any) -> dict[str, Any]:
    """Returns what a checkpoint says of its network: `{"type": ..., "model": {...}}`."""
    return {"type": kind, "model": {k: v for k, v in asdict(config).items() if k not in FREE_FIELDS}}


def load(section: Section, kinds: Kinds, where: str, *, dtype: DTypeLike, mesh: Mesh) -> nnx.Module:
    """Returns the module of a section with the weights in the workdir `from_pretrained`, sharded on the mesh.

    The moving average is taken where the run kept one. A measured latent normalisation (`latent.json`) replaces that
    of the section. Raises: UserError when the workdir has no checkpoint, or one of another network.
    """
    given = section.get("from_pretrained")
    workdir = Path(given or "")
    if not given or not (workdir / "checkpoints").is_dir():
        raise UserError(
            f"{where}.from_pretrained takes the workdir of a finished training run: got {given!r}; "
            f"train one, or give another with --{where}.from_pretrained=..."
        )
    module, config = parse_model(section, kinds, where)
    _, shapes = _abstract(module, config, dtype)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, param_shardings(shapes, mesh)
    )
    params = _restore(workdir / "checkpoints", abstract, describe(section["type"], config))
    if (workdir / "latent.json").exists():
        measured = json.loads((workdir / "latent.json").read_text())
        config = replace(config, **{name: tuple(measured[name]) for name in LATENT_FIELDS})
    return nnx.merge(_abstract(module, config, dtype)[0], params)


def _abstract(module: type, config: Any, dtype: DTypeLike) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: module(config, dtype=dtype, rngs=nnx.Rngs(0))))


def fingerprint(model: nnx.Module) -> str:
    """Returns a hash of a model's parameters, equal for equal values whatever their sharding."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(nnx.state(model, nnx.Param)):
        digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def _restore(folder: Path, abstract: nnx.State, expected: dict[str, Any]) -> nnx.State:
    with ocp.CheckpointManager(folder.absolute(), options=ocp.CheckpointManagerOptions(create=False)) as manager:
        step = manager.latest_step()
        if step is None:
            raise UserError(f"{folder} holds no finished checkpoint: let the training run save one first")
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        check_same(json.loads(json.dumps(expected)), meta, f"{folder}/{step}")
        part = "ema" if meta["ema"] else "params"
        restore_args = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, dtype=x.dtype), abstract)
        item = ocp.args.PyTreeRestore({part: abstract}, restore_args={part: restore_args}, partial_restore=True)
        return manager.restore(step, args=ocp.args.Composite(state=item))["state"][part]


def check_same(expected: dict[str, Any], found: dict[str, Any], where: str) -> None:
    """Raises: UserError naming the first fields in which a checkpoint differs from what is asked for."""
    there = flatten(found)
    different = [
        f"{name} is {there.get(name)!r} there and {value!r} in the config"
        for name, value in flatten(expected).items()
        if there.get(name) != value
    ]
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise UserError(
            f"the checkpoint {where} does not fit the config: {'; '.join(different[:3])}{more}; "
            "use the config it was made with, or another workdir"
        )


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of nested dicts under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
