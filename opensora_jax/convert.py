"""Official weights in and out: `python -m opensora_jax.convert VERB --flags`.

import    a published file (or one of our workdirs) -> a workdir, sharded over the mesh of the config, bits unchanged
export    a workdir -> one .safetensors file with the published keys, which PyTorch users can load
verify    whether a manifest or a file of weights fits the network, key by key, without allocating it
download  published weights from the Hugging Face hub
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict
from tqdm import tqdm

from opensora_jax.config.build import build
from opensora_jax.config.command import Main, run_verbs
from opensora_jax.config.errors import UserError
from opensora_jax.config.files import write_json
from opensora_jax.config.flag import config_flag, require
from opensora_jax.parallel.mesh import MeshConfig, make_mesh
from opensora_jax.weights import hub, manifest, pretrained, workdir
from opensora_jax.weights.constants import stored_constants
from opensora_jax.weights.files import save_safetensors
from opensora_jax.weights.layouts import JOINED, to_fused, to_split
from opensora_jax.weights.views import Cast

LAYOUTS = {"opensora": to_split, "flux": to_fused}
DTYPES = ("same", *pretrained.DTYPES)


def _import(argv: list[str]) -> Path:
    """Reads the weights of a config's section and writes them as a workdir; returns it."""
    given = flags.FLAGS
    output = Path(given.output)
    where = f"config.{given.section}"
    section = _section(given.section, given.input)
    if given.adapter is not None:
        section.adapter = given.adapter
    mesh = make_mesh(build(MeshConfig, given.config.mesh, "config.mesh"))
    _, config = pretrained.parse_model(section, pretrained.MODELS, where)
    dtype = None if given.dtype == "same" else pretrained.parse_dtype(given.dtype)
    workdir.check_new(output)
    params = pretrained.load_weights(section, pretrained.MODELS, where, dtype=jnp.float32, mesh=mesh, param_dtype=dtype)
    described = pretrained.describe(section["type"], config)
    free = {name: value for name, value in asdict(config).items() if name in pretrained.FREE_FIELDS}
    measured = pretrained.measured_latent(section["from_pretrained"])
    if measured is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / pretrained.LATENT_FILE, measured)
    workdir.write(output, params, described | {"source": str(section["from_pretrained"]), "free": free})
    print(f"{output}: {section['type']} of {section['from_pretrained']}; use it as --{where}.from_pretrained={output}")
    return output


def _export(argv: list[str]) -> Path:
    """Writes the newest checkpoint of a workdir as one file; returns its folder."""
    given = flags.FLAGS
    output = Path(given.output)
    if output.suffix != ".safetensors":
        raise UserError(f"--output is the file to write, such as model.safetensors: got {given.output}")
    source = Path(given.input)
    if not workdir.is_workdir(source):
        raise UserError(f"--input is a workdir of ours, with checkpoints in it: got {source}")
    stored = workdir.Stored(source)
    if given.layout != "same" and stored.meta["type"] not in pretrained.DENOISERS:
        raise UserError(f"--layout is for an MMDiT, which has two: {source} holds a {stored.meta['type']}")
    tensors: Any = pretrained.open_weights(source, held=JOINED if given.layout == "flux" else 1)
    if given.layout != "same":
        tensors = LAYOUTS[given.layout](tensors, stored.meta["model"]["num_heads"])
    if given.dtype != "same":
        dtype = jnp.dtype(pretrained.parse_dtype(given.dtype))
        tensors = {key: Cast(tensor, dtype) for key, tensor in tensors.items()}
    tensors = tensors | stored_constants(stored.meta, str(source))
    with tqdm(total=len(tensors), desc="export", unit="tensor") as bar:
        save_safetensors(output, tensors, wrote=lambda key: bar.update())
    print(f"{output}: {len(tensors)} tensors of {source} (step {stored.step}, {stored.part})")
    if pretrained.measured_latent(source) is not None:
        print(f"The file has no place for {source / pretrained.LATENT_FILE}: give its numbers to who uses it")
    return output.parent


def _verify(argv: list[str]) -> None:
    """Says of every manifest, or of the weights of a config's section, how they fit. Raises: UserError if not."""
    given = flags.FLAGS
    if bool(given.manifest) == bool(given.config):
        raise UserError("verify takes --manifest=FILE (repeatable), or --config=FILE with --section and --input")
    found = [_verify_manifest(Path(name)) for name in given.manifest] or [_verify_weights()]
    faults = [f"{name}: {fault}" for name, match in found for fault in match.faults]
    for name, match in found:
        fit = "fits, key by key and back" if not match.faults else "does not fit"
        print(f"{name}: {match.keys} keys, {match.tensors} arrays here, {match.parameters:,} parameters: {fit}")
    if faults:
        raise UserError(f"{'; '.join(faults)}; use the config that these weights were made with")


def _verify_manifest(path: Path) -> tuple[str, manifest.Match]:
    read = manifest.read_manifest(path)
    return f"{path.name} ({read.kind})", manifest.compare(read.kind, read.config, read.shapes, read.parameters)


def _verify_weights() -> tuple[str, manifest.Match]:
    given = flags.FLAGS
    section, where = _section(given.section, given.input), f"config.{given.section}"
    _, config = pretrained.parse_model(section, pretrained.MODELS, where)
    tensors = pretrained.open_source(section, config, where)
    match = manifest.compare(section["type"], config, {key: tuple(t.shape) for key, t in tensors.items()})
    return f"{section['from_pretrained']} ({section['type']})", match


def _download(argv: list[str]) -> None:
    given = flags.FLAGS
    place = hub.download(given.repo, Path(given.output), given.include, given.revision)
    print(f"{place}: the files of {given.repo}")


def _section(name: str, source: str | None) -> ConfigDict:
    """Returns a network's section of the config, with the flags of this command in it."""
    given = flags.FLAGS
    require("config")
    if name not in given.config or "type" not in given.config[name]:
        sections = [key for key, value in given.config.items() if isinstance(value, ConfigDict) and "type" in value]
        raise UserError(f"--section is a network of the config ({', '.join(sections)}): got {name!r}")
    section = given.config[name].copy_and_resolve_references().unlock()
    if source is not None:
        section.from_pretrained = source
    if given.layout != "same":
        section.layout = given.layout
    if given.rename:
        section.rename_keys = tuple(given.rename)
    if given.part is not None:
        section.part = given.part
    if given.partial:
        section.strict_load = False
    return section


def _define_source() -> None:
    config_flag(required=False)
    flags.DEFINE_string("section", "model", "the network of the config: model, ae, ...")
    flags.DEFINE_string("input", None, "file, folder or workdir of weights; default: the section's from_pretrained")
    flags.DEFINE_multi_string("rename", [], "OLD:NEW replaces a part of the keys; repeatable")
    flags.DEFINE_string("part", None, "state dict to take from a torch file with several, such as ema")
    flags.DEFINE_bool("partial", False, "load what fits, initialise and list the rest")
    flags.DEFINE_enum("layout", "same", ["same", *LAYOUTS], "of the file, if it is not that of the model")


def _define_import() -> None:
    _define_source()
    flags.DEFINE_string("output", None, "workdir to write", required=True)
    flags.DEFINE_enum("dtype", "same", DTYPES, "of the weights in the workdir; same: as in the file")
    flags.DEFINE_string("adapter", None, "folder of a LoRA in PEFT's format, to be merged into the weights")


def _define_export() -> None:
    flags.DEFINE_string("input", None, "workdir of a training run or an import", required=True)
    flags.DEFINE_string("output", None, ".safetensors file to write", required=True)
    flags.DEFINE_enum("dtype", "same", DTYPES, "of the tensors in the file; same: as in the workdir")
    flags.DEFINE_enum("layout", "same", ["same", *LAYOUTS], "to write, if it is not that of the model")


def _define_verify() -> None:
    _define_source()
    flags.DEFINE_multi_string("manifest", [], "JSON list of published keys and shapes; repeatable")


def _define_download() -> None:
    flags.DEFINE_string("repo", "hpcai-tech/Open-Sora-v2", f"repository: {', '.join(hub.REPOSITORIES)}, or another")
    flags.DEFINE_string("output", "ckpts", "folder to write, where the presets look")
    flags.DEFINE_multi_string("include", [], "pattern of files, such as *.safetensors; repeatable; default: all")
    flags.DEFINE_string("revision", None, "branch, tag or commit")


VERBS: dict[str, Main] = {"import": _import, "export": _export, "verify": _verify, "download": _download}
DEFINE_FLAGS: dict[str, Callable[[], object]] = {
    "import": _define_import,
    "export": _define_export,
    "verify": _define_verify,
    "download": _define_download,
}


if __name__ == "__main__":
    run_verbs(VERBS, DEFINE_FLAGS)
