"""Training takes a cache that is what its config would make now, and no other; what cannot be compared is told."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from opensora_jax.config.errors import UserError
from opensora_jax.data.cache.latents import LatentCache
from opensora_jax.data.clips import ClipDataset
from opensora_jax.data.media.video_writer import write_video
from opensora_jax.data.table import records
from opensora_jax.data.table.probing import describe
from opensora_jax.inference import encode, stale
from opensora_jax.inference.encode import EncodeConfig, EncodeJob
from opensora_jax.inference.local_encoders import write_local_encoders
from opensora_jax.inference.prompt import TextEncoderConfig
from opensora_jax.inference.stale import refuse_stale
from opensora_jax.parallel.distributed import DistributedConfig
from opensora_jax.weights.pretrained import create

AUTOENCODER = {
    "type": "hunyuan_vae",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 3,
    "block_out_channels": (4, 4, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "time_compression_ratio": 4,
    "spatial_compression_ratio": 4,
    "mid_block_add_attention": False,
    "scale_factor": 0.7,
    "shift_factor": 0.1,
}


@pytest.fixture(autouse=True)
def _weights_are_drawn_by_the_number_in_their_file(monkeypatch):
    def load(section, kinds, where, *, dtype, mesh):
        return create(
            section, kinds, where, dtype=dtype, mesh=mesh, seed=int(Path(section["from_pretrained"]).read_text())
        )

    for module in encode, stale:
        monkeypatch.setattr(module, "load", load)


def probe_all(folder: Path, captions: dict[str, str]) -> None:
    """Writes the table of a folder's clips."""
    rows = [describe(str(folder / name)) | {"text": text} for name, text in captions.items()]
    records.write_table(records.pa.Table.from_pylist(rows, schema=records.SCHEMA), folder / "meta.parquet")


CAPTIONS = {f"{i}.mp4": f"caption {i % 2}" for i in range(4)}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Returns a folder with clips, encoders and the cache of them."""
    folder = tmp_path_factory.mktemp("made")
    for number, name in enumerate(CAPTIONS):
        write_video(folder / name, np.full((9, 32, 32, 3), 60 * number, np.uint8), 8)
    probe_all(folder, CAPTIONS)
    (folder / "ae").write_text("7")
    write_local_encoders(folder / "text", list(CAPTIONS.values()), seed=3, text_length=7)
    return folder


@pytest.fixture
def job(made, tmp_path) -> EncodeJob:
    """Returns what asks for the cache in a copy of that folder, which is there."""
    source = job_in(made)
    encode.run(source)
    return job_in(shutil.copytree(made, tmp_path / "copy"))


def job_in(folder: Path) -> EncodeJob:
    return EncodeJob(
        "float32",
        AUTOENCODER | {"from_pretrained": str(folder / "ae")},
        TextEncoderConfig(str(folder / "text/t5"), 7),
        TextEncoderConfig(str(folder / "text/clip"), 7),
        ClipDataset(str(folder / "meta.parquet"), 24.0, 8, "ffmpeg", 0, 0.1),
        folder / "latents",
        EncodeConfig(2, "mode", 0, None, 4, 4, fps_suffix=False, motion_score=""),
        {"32px_ar1:1": {9: (1.0, 2), 5: (0.0, 2)}},
        {"i2v_head": 1.0},
        DistributedConfig(None, None, None),
    )


def refuse(job: EncodeJob, **options) -> None:
    refuse_stale(LatentCache(job.latents), job, **options)


def folder_of(job: EncodeJob) -> Path:
    return Path(job.latents).parent


def test_the_cache_of_the_same_config_is_taken_wherever_its_folder_lies(job, caplog):
    refuse(job)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("section", "field", "value", "told"),
    [
        ("encode", "posterior", "sample", "encode.posterior = 'mode' (now 'sample')"),
        ("encode", "fps_suffix", True, "other captions, encode.fps_suffix = False (now True)"),
        ("encode", "dtype", "bfloat16", "encode.dtype = 'float32' (now 'bfloat16')"),
        ("dataset", "fps_max", 4.0, "other clips, dataset.fps_max = 24.0 (now 4.0)"),
        ("dataset", "resize", "original", "dataset.resize = 'ffmpeg' (now 'original')"),
        ("dataset", "spatial_unit", 10, "other buckets"),
        ("ae", "layers_per_block", 2, "autoencoder.layers_per_block = 1 (now 2)"),
        ("ae", "scale_factor", 0.9, "autoencoder.scale_factor = 0.7 (now 0.9)"),
        ("t5", "max_length", 6, "other text encoders"),
    ],
)
def test_a_setting_that_values_depend_on_is_named(job, section, field, value, told):
    before = getattr(job, section)
    after = before | {field: value} if section == "ae" else replace(before, **{field: value})
    with pytest.raises(UserError, match=r"latents is made of other things: .*; delete it and run `dataset ") as caught:
        refuse(replace(job, **{section: after}))
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"encode": EncodeConfig(1, "mode", 5, None, 7, 9, False, "")},
        {"dtype": "bfloat16"},
        {"bucket_config": {"32px_ar1:1": {9: (0.5, 3)}}},
        {"condition_config": {"t2v": 1.0}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_settings_that_no_value_depends_on_may_change(job, changes, caplog):
    refuse(replace(job, **changes))
    assert caplog.messages == []


def test_other_weights_are_told_from_the_same_ones_with_new_times(job, caplog):
    folder = folder_of(job)
    for path in (folder / "ae", folder / "text/t5/model.safetensors"):
        os.utime(path)
    refuse(job)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    (folder / "ae").write_text("8")
    with pytest.raises(UserError, match="made of other things: other autoencoder weights; "):
        refuse(job)
    (folder / "ae").write_text("7")
    shutil.rmtree(folder / "text")
    write_local_encoders(folder / "text", list(CAPTIONS.values()), seed=4, text_length=7)
    with pytest.raises(UserError, match="made of other things: other text encoders; "):
        refuse(job)


def test_encoding_again_notes_the_new_times(job, monkeypatch):
    os.utime(folder_of(job) / "ae")
    encode.run(job)
    monkeypatch.setattr(stale, "load", None)  # nothing is read
    refuse(job)


@pytest.mark.parametrize("change", ["caption", "file", "rows", "none"])
def test_other_clips_and_captions_are_refused_once_the_table_says_so(job, change):
    folder, captions = folder_of(job), dict(CAPTIONS)
    if change == "caption":
        captions["1.mp4"] = "another"
    elif change == "file":
        write_video(folder / "1.mp4", np.zeros((9, 32, 32, 3), np.uint8), 8)
    elif change == "rows":
        captions = dict(list(captions.items())[1:])
    else:
        write_video(folder / "a.png", np.zeros((1, 32, 32, 3), np.uint8), 8)
        captions = {"a.png": "an image"}
    probe_all(folder, captions)
    with pytest.raises(UserError, match=f"other {'captions' if change == 'caption' else 'clips'}[,;]"):
        refuse(job)
    refuse(job, clips=False)  # a cache to validate on has clips of its own


def test_what_is_not_there_is_not_compared_and_told_in_one_line(job, caplog):
    folder = folder_of(job)
    for name in "meta.parquet", "ae":
        (folder / name).unlink()
    refuse(replace(job, ae=job.ae | {"scale_factor": 0.9}))  # a measured one lies beside the weights
    (message,) = caplog.messages
    assert message.startswith(f"{folder}/latents: not compared with the config: clips and captions: Cannot read ")
    assert message.endswith("; autoencoder weights, which are not there")
    assert "\n" not in message
    with pytest.raises(UserError, match=r"encode\.posterior = 'mode' \(now 'sample'\)"):
        refuse(replace(job, encode=replace(job.encode, posterior="sample")))


def test_a_cache_of_an_earlier_version_is_taken_and_its_settings_compared(job, caplog):
    path = folder_of(job) / "latents" / "cache.json"
    about = json.loads(path.read_text())
    del about["origin"], about["identity"]["settings"]["dataset.resize"]
    path.write_text(json.dumps(about))
    refuse(replace(job, dataset=replace(job.dataset, resize="original")))
    (message,) = caplog.messages
    assert message.startswith(f"{path.parent}: not compared with the config: clips, captions and weights, of which a ")
    with pytest.raises(UserError, match=r"encode\.posterior = 'mode' \(now 'sample'\)"):
        refuse(replace(job, encode=replace(job.encode, posterior="sample")))
