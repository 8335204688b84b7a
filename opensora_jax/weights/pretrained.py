"""Models ready to use: the network of a config section with its weights, placed on a mesh.

Weights come from a workdir of ours, whose metadata names its network, or from a published file. A section that asks
for another network than the weights belong to is refused with what differs.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from opensora_jax.config.build import build
from opensora_jax.config.errors import UserError
from opensora_jax.models.clip import CLIPText, CLIPTextConfig
from opensora_jax.models.dc_ae import DCAE
from opensora_jax.models.dc_ae_config import DCAEConfig
from opensora_jax.models.discriminator import Discriminator, DiscriminatorConfig
from opensora_jax.models.flux_ae import FluxAE, FluxAEConfig
from opensora_jax.models.hunyuan_vae import HunyuanVAE, HunyuanVAEConfig
from opensora_jax.models.lpips import LPIPS, LPIPSConfig
from opensora_jax.models.mmdit import MMDiT, MMDiTConfig
from opensora_jax.models.opensora_vae import OpenSoraVAE, OpenSoraVAEConfig
from opensora_jax.models.t5 import T5Config, T5Encoder
from opensora_jax.parallel.rules import param_shardings
from opensora_jax.weights.adapter import read_adapter
from opensora_jax.weights.constants import check_constants
from opensora_jax.weights.files import open_checkpoint, read_json
from opensora_jax.weights.layouts import JOINED, to_fused, to_split
from opensora_jax.weights.lora import merge_adapter
from opensora_jax.weights.lpips_files import is_lpips, open_lpips
from opensora_jax.weights.params import load_params, published_tensors, with_stored_dtypes
from opensora_jax.weights.rename import parse_rename, rename_keys
from opensora_jax.weights.workdir import Stored, check_same, is_workdir

Section = Mapping[str, Any]
Kinds = dict[str, tuple[type, type]]

AUTOENCODERS: Kinds = {
    "hunyuan_vae": (HunyuanVAEConfig, HunyuanVAE),
    "flux_ae": (FluxAEConfig, FluxAE),
    "dc_ae": (DCAEConfig, DCAE),
    "opensora_vae": (OpenSoraVAEConfig, OpenSoraVAE),
}
DENOISERS: Kinds = {"mmdit": (MMDiTConfig, MMDiT)}
TEXT_ENCODERS: Kinds = {"t5": (T5Config, T5Encoder), "clip": (CLIPTextConfig, CLIPText)}
CRITICS: Kinds = {"lpips": (LPIPSConfig, LPIPS), "discriminator": (DiscriminatorConfig, Discriminator)}
MODELS = AUTOENCODERS | DENOISERS | TEXT_ENCODERS | CRITICS
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
LATENT_FILE = "latent.json"
LATENT_FIELDS = ("scale_factor", "shift_factor")  # measured after training
TILING_FIELDS = (
    *("use_spatial_tiling", "use_temporal_tiling", "tile_overlap_factor"),
    *("sample_size", "sample_tsize", "spatial_tile_size", "temporal_tile_size"),
)
LAYOUT_FIELDS = ("fused_qkv", "use_liger_rope")  # of the MMDiT: a change of layout changes them
FREE_FIELDS = (  # the same weights serve all values, so they are not compared
    *LATENT_FIELDS,
    *TILING_FIELDS,
    *("grad_ckpt_settings", "remat_policy"),  # of memory
    *("scaling_factor", "model_name", "from_scratch"),  # of the DC-AE
    "resolution",  # of Flux's autoencoder
    *("scale", "shift", "micro_frame_size", "micro_batch_size"),  # of Open-Sora 1.2's
)


def parse_dtype(name: str) -> DTypeLike:
    """Returns the dtype that models compute in.

    Raises: UserError for a name that is not one.
    """
    if name not in DTYPES:
        raise UserError(f"dtype is one of {', '.join(DTYPES)}: got {name!r}")
    return DTYPES[name]


@dataclass(frozen=True)
class Source:
    """Where the weights of a network are, and how a file of them becomes ours: fields of its config section."""

    from_pretrained: str | None = None
    rename_keys: tuple[str, ...] = ()  # OLD:NEW, a part of a key in the file and what stands there instead
    strict_load: bool = True  # False: load what fits, initialise and list the rest
    layout: Literal["same", "flux", "opensora"] = "same"  # of the file, where it is not the model's
    part: str | None = None  # the state dict to take from a torch file with several
    adapter: str | None = None  # folder of a LoRA in PEFT's format, to be merged into the weights

    def __post_init__(self):
        """Check what does not depend on the file."""
        for rename in self.rename_keys:
            parse_rename(rename)


SOURCE_FIELDS = tuple(field.name for field in fields(Source))


def parse_source(section: Section, where: str) -> Source:
    """Returns where a section's weights come from. Raises: UserError for a field that does not fit."""
    return build(Source, {name: section[name] for name in SOURCE_FIELDS if name in section}, where)


def parse_model(section: Section, kinds: Kinds, where: str) -> tuple[type, Any]:
    """Returns the module class and the config of a section `{type, from_pretrained, <fields>}`.

    Raises: UserError for an unknown type or a field that does not fit it.
    """
    options = {name: value for name, value in section.items() if name not in SOURCE_FIELDS}
    kind = options.pop("type", None)
    if kind not in kinds:
        raise UserError(f"{where}.type is one of {', '.join(kinds)}: got {kind!r}")
    config_class, module = kinds[kind]
    return module, build(config_class, options, where)


def describe(kind: str, config: Any) -> dict[str, Any]:
    """Returns what a checkpoint says of its network: `{"type": ..., "model": {...}}`."""
    return {"type": kind, "model": {k: v for k, v in asdict(config).items() if k not in FREE_FIELDS}}


def load(section: Section, kinds: Kinds, where: str, *, dtype: DTypeLike, mesh: Mesh) -> nnx.Module:
    """Returns the module of a section with the weights that it names, sharded on the mesh.

    Parameters are held in the dtype that it computes in. Of a workdir, the moving average is taken
    where the run kept one, and a measured latent normalisation (`latent.json`) replaces that of the section.
    Raises: UserError when there are no weights, or those of another network.
    """
    params = load_weights(section, kinds, where, dtype=dtype, mesh=mesh, param_dtype=dtype)
    module, config = parse_measured(section, kinds, where)
    return nnx.merge(_abstract(module, config, dtype)[0], params)


def parse_measured(section: Section, kinds: Kinds, where: str) -> tuple[type, Any]:
    """Returns what `parse_model` does, with the latent normalisation measured beside the weights, where there is one.

    Raises: UserError as `parse_model`.
    """
    module, config = parse_model(section, kinds, where)
    found = measured_latent(section["from_pretrained"])
    if found is None or not hasattr(config, LATENT_FIELDS[0]):
        return module, config
    return module, replace(config, **{name: tuple(found[name]) for name in LATENT_FIELDS})


def measured_latent(place: str | Path | None) -> dict[str, Any] | None:
    """Returns what was measured of an autoencoder's latents, which lies beside its weights; None if nothing does."""
    file = Path(place or "") / LATENT_FILE
    return read_json(file) if file.is_file() else None


def create(section: Section, kinds: Kinds, where: str, *, dtype: DTypeLike, mesh: Mesh, seed: int) -> nnx.Module:
    """Returns the module of a section with random weights, made where they belong on the mesh."""
    module, config = parse_model(section, kinds, where)
    graph, shapes = _abstract(module, config, dtype)
    init = jax.jit(
        lambda: nnx.state(module(config, dtype=dtype, rngs=nnx.Rngs(seed))), out_shardings=param_shardings(shapes, mesh)
    )
    return nnx.merge(graph, init())


def load_weights(
    section: Section, kinds: Kinds, where: str, *, dtype: DTypeLike, mesh: Mesh, param_dtype: DTypeLike | None
) -> nnx.State:
    """Returns the parameters of a section, read from where it says straight to the mesh's devices.

    They come in `param_dtype`, or as they are stored where it is None. A LoRA that the section names is part of them.

    Raises: UserError when there are no weights, or those of another network, and for a LoRA that does not fit.
    """
    module, config = parse_model(section, kinds, where)
    source = parse_source(section, where)
    path = find_weights(source.from_pretrained, where)
    if source.adapter is not None:
        adapter = read_adapter(source.adapter)
        if source.layout == "flux":
            adapter = adapter.to_split(config.num_heads)
        plain = {name: value for name, value in section.items() if name != "adapter"}
        params = load_weights(plain, kinds, where, dtype=dtype, mesh=mesh, param_dtype=param_dtype)
        return merge_adapter(section["type"], params, adapter, mesh)
    _, shapes = _abstract(module, config, dtype)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, param_dtype or x.dtype, sharding=s),
        shapes,
        param_shardings(shapes, mesh),
    )
    if is_workdir(path) and source == Source(source.from_pretrained) and param_dtype is not None:
        stored = Stored(path)
        _check_workdir(stored, source, describe(section["type"], config))
        return stored.read(abstract)
    checkpoint = open_source(section, config, where)
    if param_dtype is None:
        abstract = with_stored_dtypes(section["type"], checkpoint, abstract)
    initial = None if source.strict_load else partial(_initial, module, config, abstract)
    return load_params(section["type"], checkpoint, abstract, initial=initial)


def initial_weights(
    section: Section, kinds: Kinds, where: str, *, mesh: Mesh, param_dtype: DTypeLike = jnp.float32
) -> Callable[[], nnx.State] | None:
    """Returns what reads the weights that training starts from, in `param_dtype`; None when the section names none.

    Raises: UserError when they are not there.
    """
    source = parse_source(section, where)
    if source.from_pretrained is None:
        return None
    find_weights(source.from_pretrained, where)
    return partial(load_weights, section, kinds, where, dtype=jnp.float32, mesh=mesh, param_dtype=param_dtype)


def open_source(section: Section, config: Any, where: str) -> Mapping[str, Any]:
    """Returns published key -> tensor of the weights that a section names, renamed and laid out as it says.

    Raises: UserError for weights that are not there or cannot be read, and for a workdir of another network.
    """
    source = parse_source(section, where)
    path = find_weights(source.from_pretrained, where)
    if is_workdir(path):
        _check_workdir(Stored(path), source, describe(section["type"], config))
    found = open_weights(path, part=source.part, held=JOINED if source.layout == "opensora" else 1)
    checkpoint = _converted(found, source, config, where)
    check_constants(config, checkpoint, where)
    return checkpoint


def open_weights(path: Path, *, part: str | None = None, held: int = 1) -> Mapping[str, Any]:
    """Returns published key -> tensor of a file of weights, or of the newest checkpoint of one of our workdirs.

    Of a workdir's arrays, the last `held` that were read stay in memory.
    Raises: UserError for a path that holds neither, and for a `part` of a workdir.
    """
    if not is_workdir(path):
        return open_lpips(path) if is_lpips(path) else open_checkpoint(path, part=part)
    if part is not None:
        raise UserError(f"{path} is a workdir, which has no parts, as torch files may have: leave part={part!r} out.")
    stored = Stored(path, held)
    return published_tensors(stored.meta["type"], stored.arrays())


def find_weights(given: str | None, where: str) -> Path:
    """Returns the path of a section's weights. Raises: UserError unless there is a file or a folder."""
    if not given or not Path(given).exists():
        raise UserError(
            f"{where}.from_pretrained: there is no file or folder {given!r}; train the model, download it "
            f"(python -m opensora_jax.convert download), or say where it is with --{where}.from_pretrained=..."
        )
    return Path(given)


def fingerprint(model: nnx.Module) -> str:
    """Returns a hash of a model's parameters, equal for equal values whatever their sharding."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(nnx.state(model, nnx.Param)):
        digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def _check_workdir(stored: Stored, source: Source, described: dict[str, Any]) -> None:
    """Refuses a workdir of another network than the one described; it is a warning where what fits is loaded."""
    changed = () if source.layout == "same" else LAYOUT_FIELDS  # whose values _converted checks
    model = {name: value for name, value in described["model"].items() if name not in changed}
    try:
        check_same(described | {"model": model}, stored.meta, str(stored.workdir))
    except UserError as error:
        if source.strict_load:
            raise
        logging.warning("%s", error)


def _converted(checkpoint: Mapping[str, Any], source: Source, config: Any, where: str) -> Mapping[str, Any]:
    """Returns the checkpoint with its keys renamed and in the model's layout."""
    checkpoint = rename_keys(checkpoint, source.rename_keys)
    if source.layout == "same":
        return checkpoint
    if not isinstance(config, MMDiTConfig):
        raise UserError(f"{where}.layout is for the mmdit alone: got {source.layout!r}; use 'same'")
    wanted = (config.fused_qkv, config.use_liger_rope)
    convert, fits = {"flux": (to_split, (False, True)), "opensora": (to_fused, (True, False))}[source.layout]
    if wanted != fits:
        raise UserError(
            f"{where}.layout={source.layout!r} turns weights into those of a model with fused_qkv={fits[0]} and "
            f"use_liger_rope={fits[1]}: this one has {wanted[0]} and {wanted[1]}; use 'same', or change the model"
        )
    return convert(checkpoint, config.num_heads)


def _initial(module: type, config: Any, abstract: nnx.State, paths: set[Any]) -> dict[Any, jax.Array]:
    """Returns fresh values of the parameters at `paths`; no others are made."""
    wanted = {path: leaf.get_value() for path, leaf in nnx.to_flat_state(abstract) if path in paths}

    def init() -> list[jax.Array]:
        made = dict(nnx.to_flat_state(nnx.state(module(config, rngs=nnx.Rngs(0)))))
        return [made[path].get_value().astype(leaf.dtype) for path, leaf in wanted.items()]

    values = jax.jit(init, out_shardings=[leaf.sharding for leaf in wanted.values()])()
    return dict(zip(wanted, values, strict=True))


def _abstract(module: type, config: Any, dtype: DTypeLike) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: module(config, dtype=dtype, rngs=nnx.Rngs(0))))
