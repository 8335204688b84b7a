"""The convert command as users type it: weights in, out, verified; every mistake is one line and leaves nothing."""

import json
import os
import pickle
from pathlib import Path

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from huggingface_hub import errors

from opensora_jax.config.errors import UserError
from opensora_jax.config.flag import load_config
from opensora_jax.models.mmdit import MMDiT, MMDiTConfig
from opensora_jax.weights import hub
from opensora_jax.weights.files import open_checkpoint, save_safetensors
from opensora_jax.weights.layouts import to_fused
from opensora_jax.weights.pretrained import DENOISERS, parse_model
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


def test_a_download_puts_files_where_the_presets_look(tmp_path, monkeypatch):
    def download(repository, *, revision, local_dir, allow_patterns, max_workers):
        assert (repository, revision, allow_patterns) == ("openai/clip-vit-large-patch14", None, ["*.json"])
        local_dir.mkdir(parents=True)
        (local_dir / "config.json").write_text("{}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    hub.download("openai/clip-vit-large-patch14", tmp_path, ["*.json"], None)
    assert (tmp_path / "openai/clip-vit-large-patch14/config.json").is_file()


@pytest.mark.parametrize(
    "error",
    [errors.LocalEntryNotFoundError("no"), errors.OfflineModeIsEnabled("no")],
)
def test_a_download_without_a_network_says_so(tmp_path, monkeypatch, error):
    def download(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match=r"does not reach huggingface\.co"):
        hub.download("hpcai-tech/Open-Sora-v2", tmp_path, [], None)
