"""The convert command as users type it: weights in, out, verified; every mistake is one line and leaves nothing."""

import json
import os
import pickle
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import pytest
from absl import flags
from flax import nnx
from huggingface_hub import errors

from opensora_jax import convert as convert_command
from opensora_jax.config.errors import UserError
from opensora_jax.config.flag import load_config
from opensora_jax.models.mmdit import MMDiT, MMDiTConfig
from opensora_jax.parallel.mesh import one_device
from opensora_jax.weights import hub, workdir
from opensora_jax.weights.files import open_checkpoint, save_safetensors
from opensora_jax.weights.layouts import to_fused
from opensora_jax.weights.pretrained import DENOISERS, describe, load_weights, parse_model
from opensora_jax.weights.rename import published_shapes

ROOT = Path(__file__).parents[1]
GOLDENS = ROOT / "tests" / "goldens"
CONFIG = "configs/diffusion/train/demo.py"
SMALL = [f"--config.model.{field}" for field in ("hidden_size=24", "axes_dim=(2,2,2)", "depth=2")]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A published file of the demo's denoiser, made small, in bfloat16."""
    section = load_config(ROOT / CONFIG).model.to_dict() | {"hidden_size": 24, "axes_dim": (2, 2, 2), "depth": 2}
    _, config = parse_model(section, DENOISERS, "config.model")
    assert isinstance(config, MMDiTConfig)
    shapes = published_shapes("mmdit", nnx.state(nnx.eval_shape(lambda: MMDiT(config, rngs=nnx.Rngs(0))), nnx.Param))
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("published") / "model.safetensors"
    save_safetensors(
        path, {key: rng.standard_normal(shape).astype(ml_dtypes.bfloat16) for key, shape in shapes.items()}
    )
    return path


def assert_same(path, expected):
    found = open_checkpoint(path)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        np.testing.assert_array_equal(np.asarray(found[key]), np.asarray(tensor), strict=True)


def test_what_is_imported_on_a_mesh_is_exported_bit_by_bit_in_either_layout(convert, published, tmp_path):
    mesh = ("--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    workdir, file, flux = tmp_path / "workdir", tmp_path / "out.safetensors", tmp_path / "flux.safetensors"
    done = convert(
        "import", f"--config={CONFIG}", *SMALL, *mesh, f"--input={published}", f"--output={workdir}", devices=4
    )
    assert done.returncode == 0, done.stderr
    assert f"--config.model.from_pretrained={workdir}" in done.stdout
    assert json.loads((workdir / "runs.jsonl").read_text())["peak_memory_bytes"] > 0
    (workdir / "latent.json").write_text('{"scale_factor": [2.0]}')  # as beside a trained autoencoder
    done = convert("export", f"--input={workdir}", f"--output={file}")
    assert done.returncode == 0, done.stderr
    assert f"no place for {workdir / 'latent.json'}" in done.stdout
    assert_same(file, open_checkpoint(published))
    again = tmp_path / "again"
    done = convert("import", f"--config={CONFIG}", *SMALL, f"--input={workdir}", f"--output={again}")
    assert done.returncode == 0, done.stderr
    assert json.loads((again / "latent.json").read_text()) == {"scale_factor": [2.0]}
    done = convert("export", f"--input={workdir}", f"--output={flux}", "--layout=flux", "--dtype=float32")
    assert done.returncode == 0, done.stderr
    expected = to_fused(open_checkpoint(published), heads=4)
    assert_same(flux, {key: np.asarray(tensor).astype(np.float32) for key, tensor in expected.items()})


@pytest.mark.parametrize("layout", ["same", "flux"])
def test_an_export_reads_every_stored_array_once(published, tmp_path, monkeypatch, layout):
    section = load_config(ROOT / CONFIG).model.to_dict()
    section |= {"hidden_size": 24, "axes_dim": (2, 2, 2), "depth": 2, "from_pretrained": str(published)}
    _, config = parse_model(section, DENOISERS, "config.model")
    params = load_weights(
        section, DENOISERS, "config.model", dtype=np.float32, mesh=one_device(), param_dtype=np.float32
    )
    workdir.write(tmp_path / "workdir", params, describe("mmdit", config))
    read, restore = [], workdir.Stored._restore
    monkeypatch.setattr(workdir.Stored, "_restore", lambda *args: read.append(args) or restore(*args))
    given = {"input": tmp_path / "workdir", "output": tmp_path / "out.safetensors", "layout": layout, "dtype": "same"}
    monkeypatch.setattr(flags, "FLAGS", SimpleNamespace(**given))
    convert_command.VERBS["export"]([])
    assert len(read) == len(jax.tree.leaves(params))


def test_manifests_and_files_are_verified_without_a_model(convert, published):
    names = ("t5_v1_1_xxl_encoder", "clip_vit_large_patch14_text", "opensora_v2_mmdit_11b", "flux1_dev_image_model")
    done = convert("verify", *(f"--manifest={GOLDENS / name}.json" for name in names))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(line.endswith("fits, key by key and back") for line in lines)
    counts = ("4,762,310,656", "123,060,480", "11,891,390,528", "11,901,408,320")
    assert [f"{count} parameters" in line for count, line in zip(counts, lines, strict=True)] == [True] * 4
    done = convert("verify", f"--config={CONFIG}", *SMALL, f"--input={published}")
    assert done.returncode == 0, done.stderr


def test_a_file_of_another_size_is_told_apart_by_key(convert, published):
    done = convert("verify", f"--config={CONFIG}", f"--input={published}")
    assert done.returncode == 1
    assert "cond_in.bias is (24,) and (192,) here" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


class Danger:
    def __reduce__(self):
        return os.system, ("touch danger",)


@pytest.mark.parametrize(
    ("name", "make", "complaint"),
    [
        ("cut.safetensors", lambda whole: whole[:-7], "not a whole safetensors file"),
        ("text.safetensors", lambda whole: b"no weights at all", "not a whole safetensors file"),
        ("code.pt", lambda whole: pickle.dumps(Danger(), 2), "only weights are read"),
    ],
)
def test_damaged_and_dangerous_files_are_refused_and_nothing_is_written(
    convert, published, tmp_path, name, make, complaint
):
    (tmp_path / name).write_bytes(make(published.read_bytes()))
    out = tmp_path / "out"
    done = convert("import", f"--config={CONFIG}", *SMALL, f"--input={tmp_path / name}", f"--output={out}")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert complaint in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not out.exists()
    assert not (ROOT / "danger").exists()


def test_keys_with_a_prefix_are_renamed(convert, published, tmp_path):
    prefixed = tmp_path / "prefixed.safetensors"
    save_safetensors(
        prefixed, {f"module.{key}": np.asarray(tensor) for key, tensor in open_checkpoint(published).items()}
    )
    done = convert("verify", f"--config={CONFIG}", *SMALL, f"--input={prefixed}", "--rename=module.:")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["verify"], "verify takes --manifest=FILE (repeatable), or --config"),
        (
            ["import", f"--config={CONFIG}", "--output=x", "--section=t5"],
            "--section is a network of the config (ae, model)",
        ),
        (["import", f"--config={CONFIG}", "--output=x", "--rename=a"], "a rename is OLD:NEW"),
        (["export", "--input=configs", "--output=x.safetensors"], "--input is a workdir of ours"),
        (["export", "--input=configs", "--output=x"], "--output is the file to write"),
    ],
)
def test_mistakes_are_one_line(convert, arguments, complaint):
    done = convert(*arguments)
    assert done.returncode == 1
    assert complaint in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def fake_hub(monkeypatch, files, written):
    """A hub whose repositories all list `files`, of which a download writes `written`."""

    def download(repository, *, revision, local_dir, allow_patterns, max_workers, dry_run):
        if dry_run:
            return [SimpleNamespace(filename=name) for name in files if fnmatch(name, (allow_patterns or ["*"])[0])]
        local_dir.mkdir(parents=True)
        return [(local_dir / name).write_text("{}") for name in written]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


def test_a_download_puts_files_where_the_presets_look(tmp_path, monkeypatch):
    fake_hub(monkeypatch, ["config.json", "model.bin"], written=["config.json"])
    hub.download("openai/clip-vit-large-patch14", tmp_path, ["*.json"], None)
    assert (tmp_path / "openai/clip-vit-large-patch14/config.json").is_file()


def test_a_download_of_nothing_or_of_a_part_is_an_error(tmp_path, monkeypatch):
    fake_hub(monkeypatch, ["config.json", "model.bin"], written=["config.json"])
    with pytest.raises(UserError, match=r"a/b has no file that matches \*\.zip: give other --include"):
        hub.download("a/b", tmp_path, ["*.zip"], None)
    with pytest.raises(UserError, match=r"model\.bin is missing"):
        hub.download("a/b", tmp_path, [], None)


def test_a_download_without_a_network_into_a_folder_with_files_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"does not reach huggingface\.co"):
        hub.download("hpcai-tech/Open-Sora-v2", tmp_path, [], None)


def test_a_repository_is_an_owner_and_a_name(tmp_path):
    with pytest.raises(UserError, match=r"--repo is OWNER/NAME, as on huggingface\.co: got 'a/b/c'"):
        hub.download("a/b/c", tmp_path, [], None)


def caused(error, cause):
    error.__cause__ = cause
    return error


RESPONSE = SimpleNamespace(headers={}, request=None)
REFUSALS = {
    r"does not reach huggingface\.co": (
        errors.LocalEntryNotFoundError("no"),
        errors.OfflineModeIsEnabled("no"),
        errors.HTTPError("no connection"),
        errors.DryRunError("no"),
        caused(errors.DryRunError("no"), errors.HTTPError("no connection")),
    ),
    "asks for an agreement": (caused(errors.DryRunError("no"), errors.GatedRepoError("no", response=RESPONSE)),),
    "has no repository": (caused(errors.DryRunError("no"), errors.RepositoryNotFoundError("no", response=RESPONSE)),),
    "has no revision 'x'": (errors.RevisionNotFoundError("no", response=RESPONSE),),
    r"\(busy\); the same": (
        caused(errors.LocalEntryNotFoundError("no"), errors.HfHubHTTPError("busy", response=RESPONSE)),
    ),
    r"\(disk full\); the same": (OSError("disk full"),),
}


@pytest.mark.parametrize(("said", "error"), [(said, error) for said, some in REFUSALS.items() for error in some])
def test_a_download_that_fails_says_why(tmp_path, monkeypatch, said, error):
    def download(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match=said):
        hub.download("hpcai-tech/Open-Sora-v2", tmp_path, [], "x")
