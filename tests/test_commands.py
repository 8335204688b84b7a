"""The commands as a user runs them: the whole way of the demo, tiny; kill -9; 8 devices; and every kind of bad input.

All tests read one finished demo folder; what they change, they change in a copy.
"""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opensora_jax.data.media import video
from opensora_jax.data.media.ffmpeg_process import binary
from opensora_jax.data.media.video_writer import write_video
from opensora_jax.data.table import probing, records
from opensora_jax.inference import outputs
from tests.commands import ENVIRONMENT, ROOT, Command
from tests.environment import cpu_devices, free_port

EIGHT_DEVICES = cpu_devices(8)
PARTS = ("data=1", "fsdp=2", "seq=2", "tensor=2")

VAE_STEPS, STEPS = 10, 14
AUTOENCODER = ("latent_channels=4", "block_out_channels=(4,4,8)", "mid_block_add_attention=False")
DENOISER = ("in_channels=16", "hidden_size=24", "axes_dim=(2,2,2)", "depth=1", "depth_single_blocks=1")
LOOP = ("log_every=1", "ckpt_every=2")


def setting(section: str, *fields: str) -> list[str]:
    return [f"--config.{section}.{field}" for field in fields]


def vae_flags(folder: Path, *more: str) -> list[str]:
    """Returns the arguments of train_vae for a tiny run: the first five steps see single frames."""
    size = [
        *setting("model", *AUTOENCODER),
        *setting("loop", f"num_steps={VAE_STEPS}", *LOOP),
        "--config.images.steps=3",
    ]
    size += ["--config.validation.latent_clips=8", "--config.optim.cls=adamw"]  # Adam compiles faster than Muon
    return ["--config=configs/vae/train/demo.py", f"--config.folder={folder}", *size, *more]


def train_flags(folder: Path, *more: str) -> list[str]:
    """Returns the arguments of train, and of `dataset encode`, for a tiny run."""
    size = [*setting("model", *DENOISER), *setting("ae", *AUTOENCODER)]
    size += ["--config.bucket_config['32px_ar1:1'][9]=(1.0,8)", *setting("loop", f"num_steps={STEPS}", *LOOP)]
    return ["--config=configs/diffusion/train/demo.py", f"--config.folder={folder}", *size, *more]


def sample_flags(folder: Path, *more: str) -> list[str]:
    """Returns the arguments of sample for two steps each; the prompts are missing."""
    size = [*setting("model", *DENOISER), *setting("ae", *AUTOENCODER), "--config.sampling_option.num_steps=2"]
    return ["--config=configs/diffusion/inference/demo.py", f"--config.folder={folder}", *size, *more]


@pytest.fixture(scope="session")
def world(command, tmp_path_factory) -> Path:
    """Returns the folder of a finished tiny demo; workers of pytest-xdist share it."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    folder = shared / "world"
    with (shared / "world.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "summary.json").exists():
            make_world(command, folder)
    return folder


def make_world(command: Command, folder: Path) -> None:
    data = folder / "data"
    command("dataset", "demo", f"--output={data}", "--num_clips=16")
    command("dataset", "meta", f"--input={data}/captions.csv", f"--output={folder}/meta.parquet")
    command("dataset", "meta", f"--input={data}/held_out.csv", f"--output={folder}/held_out.parquet")
    command("dataset", "text", f"--meta={folder}/meta.parquet", f"--output={folder}/text")
    command("train_vae", *vae_flags(folder))
    command("dataset", "encode", *train_flags(folder))
    command("train", *train_flags(folder))
    command("sample", *sample_flags(folder, f"--prompts={data}/prompts.txt", "--config.num_samples=2"))
    command("report", f"--folder={folder}", "--wall_seconds=7")


def files(folder: Path) -> dict[str, int]:
    """Returns every file below a folder, with its time."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


SPEED = ("step_seconds", "data_wait_seconds", "samples_per_second", "tokens_per_second", "tflops_per_device")


def metrics(workdir: Path) -> list[dict]:
    """Returns the logged lines but for the times."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in SPEED} for line in lines]


def test_the_whole_way_leaves_what_it_promises(world):
    for pattern in (
        "data/videos/*.mp4",
        "vae/reconstructions/*.mp4",
        "vae/tensorboard/events.*",
        f"vae/checkpoints/{VAE_STEPS}",
        "latents/cache.json",
        "diffusion/tensorboard/events.*",
        f"diffusion/checkpoints/{STEPS}",
        "samples/0000_*.mp4",
        "samples/0001_*.mp4",
    ):
        assert list(world.glob(pattern)), pattern
    for name in ("contact_sheet.png", "loss_curves.png"):
        with Image.open(world / name) as picture:
            assert min(picture.size) > 30
    sampled = video.probe(next(world.glob("samples/0001_*.mp4")))
    assert (sampled.num_frames, sampled.height, sampled.width, sampled.fps) == (9, 32, 32, 8.0)
    assert [name for name in files(world) if "tmp" in name or "/." in name] == []


def test_the_summary_holds_the_numbers_of_the_demo(world):
    summary = json.loads((world / "summary.json").read_text())
    assert summary["missing"] == []
    assert summary["wall_seconds"] == 7
    assert summary["peak_memory_bytes"] > 100 << 20
    assert 0 < summary["autoencoder"]["validation"]["psnr_db"] < 100
    for name, steps in ("autoencoder", VAE_STEPS), ("diffusion", STEPS):
        training = summary[name]["training"]
        assert training["steps"] == steps
        assert min(training["loss_first"], training["loss_last"], training["median_step_seconds"]) > 0
    followed = summary["prompt_following"]
    assert followed["samples"] == 2
    assert all(0 <= followed[f"{name}_accuracy"] <= 1 for name in ("color", "direction", "shape", "background"))
    ran = [line["command"] for line in summary["commands"]]
    assert ran == ["dataset demo", "dataset meta", "dataset text", "train_vae", "dataset encode", "train", "sample"]


def test_a_second_run_reuses_what_is_there(world, command, tmp_path):
    folder = shutil.copytree(world, tmp_path / "world")  # new paths and times: the first samples are made again
    prompts = sample_flags(folder, f"--prompts={folder}/data/prompts.txt", "--config.num_samples=2")
    command("sample", *prompts)
    before = files(folder)
    command("dataset", "demo", f"--output={folder}/data", "--num_clips=16")
    command("dataset", "text", f"--meta={folder}/meta.parquet", f"--output={folder}/text")
    assert "16 latents and " in (said := command("dataset", "encode", *train_flags(folder)).stdout)
    assert "in 2 shards, 0 of them new" in said
    assert f"already finished at step {STEPS}" in command("train", *train_flags(folder)).stderr
    assert "0 new videos, 2 kept" in command("sample", *prompts).stdout
    changed = {name for name, changed_at in files(folder).items() if before.get(name) != changed_at}
    lists = {"config.json", "metrics.jsonl", "runs.jsonl", "samples.json", "contact_sheet.png"}
    assert {Path(name).name for name in changed if "tensorboard" not in name} <= lists


def vae_use_flags(world: Path, folder: Path, *more: str) -> list[str]:
    """Returns the arguments of the vae command on the world's autoencoder and its held-out clips."""
    size = [*setting("model", *AUTOENCODER), *setting("encode", "batch_size=4", "shard_clips=8")]
    where = [f"--config.folder={world}", f"--config.save_dir={folder}", "--config.num_samples=10"]
    return ["--config=configs/vae/inference/demo.py", *where, *size, *more]


def test_an_autoencoder_shows_measures_and_keeps_what_it_makes_of_clips(world, command, tmp_path):
    flags = vae_use_flags(world, tmp_path)
    said = command("vae", "reconstruct", *flags).stdout
    assert "10 clips, source on the left; psnr_db" in said
    (first, *others) = sorted((tmp_path / "reconstructions").glob("*.mp4"))
    assert (video.probe(first).width, video.probe(first).height, len(others)) == (64, 32, 9)
    lines = (tmp_path / "reconstructions.csv").read_text().splitlines()
    assert len(lines) == 1 + 10 + 2  # and the totals
    assert [line.split(",")[1] for line in lines[-2:]] == ['"mean"', '"worst"']
    assert [line.split()[0] for line in said.splitlines()[-3:-1]] == ["mean", "worst"]
    assert {"psnr_db", "ssim", "path", "text"} <= set(lines[0].replace('"', "").split(","))
    first.unlink()  # as if the run had been killed: only this one is made again
    before = files(tmp_path / "reconstructions")
    assert command("vae", "reconstruct", *flags).stdout == said
    assert len(set(files(tmp_path / "reconstructions").items()) - set(before.items())) == 2
    random = vae_use_flags(world, tmp_path / "random", "--config.model.from_pretrained=", "--config.num_samples=2")
    assert "the autoencoder has random weights" in command("vae", "reconstruct", *random).stderr


def test_latents_are_encoded_in_shards_that_are_continued(world, command, tmp_path):
    flags = vae_use_flags(world, tmp_path)
    assert "10 latents in 2 shards, 2 of them new" in command("vae", "encode", *flags).stdout
    (tmp_path / "latents" / "latents-00001-of-00002.parquet").unlink()
    assert "10 latents in 2 shards, 1 of them new" in command("vae", "encode", *flags).stdout
    other = command("vae", "encode", *flags, "--config.encode.posterior=sample", status=1)
    assert "encode.posterior = 'mode' (now 'sample')" in other.stderr


def test_latent_statistics_do_not_depend_on_the_mesh(world, command, tmp_path):
    found = []
    for name, mesh, environment in (("one", (), {}), ("eight", setting("mesh", *PARTS), EIGHT_DEVICES)):
        folder = tmp_path / name
        command("vae", "stats", *vae_use_flags(world, folder, *mesh), environment=environment)
        found.append(json.loads((folder / "stats.json").read_text()))
    assert found[0]["clips"] == found[1]["clips"] == 10
    np.testing.assert_allclose(found[0]["mean"], found[1]["mean"], atol=1e-5)
    np.testing.assert_allclose(found[0]["std"], found[1]["std"], rtol=1e-5)
    training = json.loads((world / "vae" / "latent.json").read_text())
    assert np.shape(found[0]["scale_factor"]) == np.shape(training["scale_factor"])


def test_frames_that_an_autoencoder_cannot_take_are_refused_before_it_is_loaded(world, command, tmp_path):
    flags = vae_use_flags(world, tmp_path / "out", "--config.bucket_config['32px_ar1:1']={8: (1.0, 1)}")
    refused = command("vae", "stats", *flags, "--config.model.from_pretrained=nowhere", status=1).stderr
    assert "32px_ar1:1, 8 frames: The autoencoder takes 1 + 4 n frames: got 8: use 5 or 9." in refused
    assert not (tmp_path / "out").exists()


DC_AE = """
from configs.vae.train import demo

def get_config():
    config = demo.get_config()
    del config["model"]
    config.model = {"type": "dc_ae", "model_name": "dc-ae-f32t4c128", "from_pretrained": None}
    return config
"""


def test_an_autoencoder_that_is_not_trained_yet_is_one_line(world, command, tmp_path):
    (tmp_path / "dc_ae.py").write_text(DC_AE)
    flags = [f"--config={tmp_path}/dc_ae.py", f"--config.folder={world}", f"--config.workdir={tmp_path}/run"]
    errors = command("train_vae", *flags, status=1).stderr
    assert "error: train_vae trains hunyuan_vae and flux_ae: got config.model.type='dc_ae'" in errors
    assert not (tmp_path / "run").exists()


def test_frames_that_would_not_come_back_are_refused_before_training(world, command, tmp_path):
    flags = vae_flags(world, f"--config.workdir={tmp_path}/run", "--config.bucket_config['32px_ar1:1']={8: (1.0, 4)}")
    errors = command("train_vae", *flags, status=1).stderr
    assert "32px_ar1:1, 8 frames: The autoencoder takes 1 + 4 n frames: got 8: use 5 or 9." in errors
    assert not (tmp_path / "run").exists()


def test_a_video_without_frames_is_one_line(world, command, tmp_path):
    silent = [binary(), "-loglevel", "error", "-f", "lavfi", "-i", "sine=duration=1", str(tmp_path / "sound.m4a")]
    subprocess.run(silent, check=True, timeout=60)
    table = records.read_table(world / "held_out.parquet").slice(0, 1)
    table = table.set_column(table.column_names.index("path"), "path", [[str(tmp_path / "sound.m4a")]])
    records.write_table(table, tmp_path / "meta.parquet")
    flags = vae_use_flags(world, tmp_path / "out", f"--config.dataset.data_path={tmp_path}/meta.parquet")
    for verb, said in (
        ("reconstruct", "none of the 1 clips could be reconstructed"),
        ("stats", "none of the 1 clips has a latent to measure"),
        ("encode", "none of the 1 clips could be encoded"),
    ):
        errors = command("vae", verb, *flags, status=1).stderr
        assert f"error: {said}: 1 of the clips: " in errors
        assert "sound.m4a" in errors.rpartition("error: ")[2]
        assert "Traceback" not in errors


T2I2V = """
from configs.diffusion.inference import demo

def get_config():
    config = demo.get_config()
    config.use_t2i2v, config.cond_type, config.img_resolution = True, "i2v_head", "48px"
    config.sampling_option.guidance_img = 2.0
    config.img_flux, config.img_flux_ae = config.model.to_dict(), config.ae.to_dict()
    return config
"""


def t2i2v_flags(world: Path, folder: Path) -> list[str]:
    """Returns the arguments of sample for an image of each prompt and then a video that begins with it."""
    (folder / "t2i2v.py").write_text(T2I2V)
    flags = [f"--config={folder}/t2i2v.py", *sample_flags(world, f"--config.save_dir={folder}/out", PROMPT)[1:]]
    flags += setting("img_flux", *DENOISER, f"from_pretrained={world}/diffusion")
    return flags + setting("img_flux_ae", *AUTOENCODER, f"from_pretrained={world}/vae")


def test_a_video_begins_with_an_image_that_a_second_run_keeps(world, command, tmp_path):
    flags = t2i2v_flags(world, tmp_path)
    log = command("sample", *flags).stderr
    assert "2 forward passes for 2 steps of t2v" in log  # distilled: one a step
    assert "6 forward passes for 2 steps of i2v_head" in log
    assert video.probe(tmp_path / "out" / "0000_a-red-circle_image.png").height == 48
    assert video.probe(tmp_path / "out" / "0000_a-red-circle.mp4").num_frames == 9
    log = command("sample", *flags, "--config.fps_save=4").stderr
    assert "1 of 1 images are in" in log
    assert "of t2v" not in log


def test_two_processes_sample_what_one_does(world, command, tmp_path):
    flags = [*t2i2v_flags(world, tmp_path), "--prompt=a blue square"]
    command("sample", *flags)
    flags += [f"--config.save_dir={tmp_path}/two", *setting("mesh", "data=2", "fsdp=1", "seq=1", "tensor=2")]
    printed = together("sample", *flags)
    assert "2 new videos, 0 kept" in printed[0]
    assert "new videos" not in printed[1]
    names = "0000_a-red-circle_image.png", "0000_a-red-circle.mp4", "0001_a-blue-square.mp4"
    one, two = ([outputs.read(tmp_path / folder / name).astype(int) for name in names] for folder in ("out", "two"))
    for number, name in enumerate(names):
        assert np.abs(one[number] - two[number]).mean() < 2, name  # a level in a pixel is more after H.264
    assert np.abs(one[1] - one[2]).mean() > 10
    assert (tmp_path / "two" / "runs.jsonl").read_text().count("\n") == 1


def together(name: str, *arguments: str, processes: int = 2) -> list[str]:
    """Runs a command in processes of two devices each that find each other; returns what each printed."""
    shared = [f"coordinator_address=localhost:{free_port()}", f"num_processes={processes}"]
    line, started = [sys.executable, "-m", f"opensora_jax.{name}", *arguments], []
    for number in range(processes):
        many = setting("distributed", *shared, f"process_id={number}")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(line + many, cwd=ROOT, env=ENVIRONMENT | cpu_devices(2), **pipes))
    printed = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0] * processes, printed
    return printed


def kill_at(step: int, name: str, workdir: Path, *arguments: str) -> None:
    """Starts a command and kills it as soon as it has logged `step`."""
    line = [sys.executable, "-m", f"opensora_jax.{name}", *arguments]
    deadline = time.monotonic() + 120
    with subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        log = workdir / "metrics.jsonl"
        while not log.exists() or log.read_bytes().count(b"\n") < step:
            assert run.poll() is None, "the command ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        run.kill()
    assert run.returncode == -signal.SIGKILL


def test_train_killed_twice_ends_with_the_losses_of_an_uninterrupted_run(world, command, tmp_path):
    workdir = tmp_path / "run"
    flags = train_flags(world, f"--config.workdir={workdir}")
    for step in (1, 7):  # before the first checkpoint, and between two
        kill_at(step, "train", workdir, *flags)
        assert len(metrics(workdir)) < STEPS
    assert "continuing at step" in command("train", *flags).stderr
    assert metrics(workdir) == metrics(world / "diffusion")


def test_train_vae_killed_ends_with_the_losses_of_an_uninterrupted_run(world, command, tmp_path):
    workdir = tmp_path / "run"
    flags = vae_flags(world, f"--config.workdir={workdir}")
    kill_at(3, "train_vae", workdir, *flags)  # the next step is the first on videos, and compiles
    command("train_vae", *flags)
    assert metrics(workdir) == metrics(world / "vae")
    for name in ("validation.json", "latent.json"):
        assert (workdir / name).read_text() == (world / "vae" / name).read_text()


LORA_CONFIG = """
from configs.diffusion.train import demo

def get_config():
    config = demo.get_config()
    config.lora = {"rank": 2, "alpha": 4.0, "targets": ("single_blocks",), "from_pretrained": None}
    return config
"""


def test_a_lora_learns_alone_continues_and_is_left_in_a_folder(world, command, tmp_path):
    (tmp_path / "lora.py").write_text(LORA_CONFIG)
    run, flags = tmp_path / "run", [f"--config={tmp_path}/lora.py", *train_flags(world)[1:]]
    flags += [f"--config.workdir={run}", f"--config.model.from_pretrained={world}/diffusion"]
    command("train", *flags, "--config.loop.num_steps=3")
    command("train", *flags, "--config.loop.num_steps=6")
    command("train", *flags, "--config.loop.num_steps=6", f"--config.workdir={tmp_path}/whole")
    assert [line["loss"] for line in metrics(run)] == [line["loss"] for line in metrics(tmp_path / "whole")]
    about = json.loads((run / "lora" / "adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"]) == (2, 4.0)
    sizes = [
        sum(files_bytes(folder / "checkpoints" / step)) for folder, step in ((run, "6"), (world / "diffusion", "14"))
    ]
    assert sizes[0] < sizes[1]


def test_a_lora_is_merged_for_sampling_and_into_weights(world, command, tmp_path):
    (tmp_path / "lora.py").write_text(LORA_CONFIG)
    base = f"--config.model.from_pretrained={world}/diffusion"
    flags = [f"--config={tmp_path}/lora.py", *train_flags(world)[1:], base, f"--config.workdir={tmp_path}/run"]
    flags += ["--config.lora.alpha=400.0"]  # so that two steps change what one sees
    command("train", *flags, "--config.loop.num_steps=2", "--config.optim.lr=0.5", "--config.optim.warmup_steps=0")
    adapter = f"{tmp_path}/run/lora"
    command("convert", "import", *train_flags(world), base, f"--adapter={adapter}", f"--output={tmp_path}/merged")
    frames = []
    for place, weights in ("plain", [base]), ("beside", [base, f"--config.model.adapter={adapter}"]), ("merged", []):
        weights = weights or [f"--config.model.from_pretrained={tmp_path}/merged"]
        command("sample", *sample_flags(world, f"--config.save_dir={tmp_path}/{place}", PROMPT, *weights))
        frames.append(outputs.read(tmp_path / place / "0000_a-red-circle.mp4"))
    plain, beside, merged = frames
    np.testing.assert_array_equal(beside, merged)
    assert np.abs(beside.astype(int) - plain).max() > 3


STAGES_CONFIG = """
from ml_collections import ConfigDict
from configs.diffusion.train import demo


def get_config():
    return ConfigDict({"stages": ("first", "second"), "first": demo.get_config(), "second": demo.get_config()})
"""


def test_stages_run_in_a_row_and_go_on_in_the_right_one(world, command, tmp_path):
    (tmp_path / "stages.py").write_text(STAGES_CONFIG)
    flags = [f"--config={tmp_path}/stages.py"]
    for stage in ("first", "second"):
        flags += [flag.replace("--config.", f"--config.{stage}.") for flag in train_flags(world)[1:]]
        flags += [f"--config.{stage}.workdir={tmp_path}/{stage}"]
    flags += ["--config.first.loop.num_steps=3", "--config.second.seed=5"]
    command("train", *flags, "--config.second.loop.num_steps=2")
    again = command("train", *flags, "--config.second.loop.num_steps=4").stderr
    assert "first is finished: on to the next stage" in again
    assert "continuing at step 2 of 4" in again
    alone = ["--config.seed=5", "--config.loop.num_steps=4", f"--config.workdir={tmp_path}/alone"]
    command("train", *train_flags(world, *alone, f"--config.model.from_pretrained={tmp_path}/first"))
    losses, expected = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("second", "alone"))
    assert losses == expected
    wrong = command("train", *flags, "--config.stages=('first','third')", status=1).stderr
    assert "error: config.stages names some of first, second, in their order: got ('first', 'third')" in wrong


def test_a_batch_size_is_left_to_the_memory_and_kept(world, command, tmp_path):
    auto = "--config.bucket_config['32px_ar1:1'][9]=(1.0,'auto')"
    flags = [flag for flag in train_flags(world) if "bucket_config" not in flag]
    flags += [auto, "--config.auto_batch.memory_gib=2", "--config.auto_batch.largest=8", f"--config.workdir={tmp_path}"]
    first = command("train", *flags, "--config.loop.num_steps=2").stderr
    assert re.search(r"32px_ar1:1, 9 frames +8 samples of a data shard", first)
    command("train", *flags, "--config.loop.num_steps=4", "--config.auto_batch.largest=5")
    losses, expected = ([line["loss"] for line in metrics(path)] for path in (tmp_path, world / "diffusion"))
    assert losses[:2] == expected[:2]  # that of 8 samples, which the checkpoint is tied to
    assert len(losses) == 4


def files_bytes(folder: Path) -> list[int]:
    return [path.stat().st_size for path in folder.rglob("*") if path.is_file()]


def test_training_from_videos_needs_no_cache(world, command, tmp_path):
    flags = train_flags(world, "--config.latents=", f"--config.workdir={tmp_path}/run", "--config.loop.num_steps=4")
    flags += ["--config.validation.every=3", f"--config.validation.data_path={world}/held_out.parquet"]
    flags += ["--config.preview.every=4", "--config.preview.sampling_option.num_steps=2"]
    flags += ["--config.condition_config.i2v_head=5.0", "--config.accumulation_steps=2"]
    command("train", *flags, "--config.loop.num_steps=3")
    other = command("train", *flags, "--config.encode.posterior=sample", status=1).stderr
    assert "encode.posterior" in other
    command("train", *flags, "--config.encode.batch_size=1")  # where memory is short
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "validation_loss" in line] == [3, 4]
    lines = [line for line in lines if "loss" in line]
    shown = sorted((tmp_path / "run" / "samples" / "4").iterdir())
    assert [path.name for path in shown] == [
        "00_a-red-circle-moves-up-on-a-dark-background.mp4",
        "01_a-blue-square-moves-left-on-a-light-background.mp4",
    ]
    assert video.probe(shown[0]).num_frames == 9
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["skipped_steps"] == 0 for line in lines)
    assert {line["bucket"] for line in lines} == {"32px_ar1:1 1:1, 9 frames of 32x32"}


def test_synthetic_clips_train_without_a_file(world, command, tmp_path):
    flags = train_flags(world, "--config.latents=", f"--config.workdir={tmp_path}/run", "--config.loop.num_steps=2")
    command("train", *flags, "--config.dataset.data_path=synthetic:64")
    assert [line["replaced_samples"] for line in metrics(tmp_path / "run")] == [0, 0]


def test_eight_devices_train_with_the_losses_of_one_and_sample(world, command, tmp_path):
    workdir, mesh = tmp_path / "run", setting("mesh", *PARTS)
    half = "--config.bucket_config['32px_ar1:1'][9]=(1.0,4)"  # for each of 2 data shards
    flags = [flag for flag in train_flags(world) if "bucket_config" not in flag]
    flags += [f"--config.workdir={workdir}", half, "--config.loop.num_steps=3", *mesh]
    command("train", *flags, environment=EIGHT_DEVICES)
    losses, expected = ([line["loss"] for line in metrics(path)] for path in (workdir, world / "diffusion"))
    np.testing.assert_allclose(losses, expected[:3], rtol=1e-5)
    places = [f"--config.save_dir={tmp_path}/samples", f"--config.model.from_pretrained={workdir}"]
    command("sample", *sample_flags(world, *places, *mesh, "--prompt=a red circle"), environment=EIGHT_DEVICES)
    assert video.probe(tmp_path / "samples" / "0000_a-red-circle.mp4").num_frames == 9


@pytest.fixture(scope="session")
def mess(world, tmp_path_factory) -> Path:
    """Returns a folder of things that no command should take, beside a copy of the finished demo."""
    folder = tmp_path_factory.mktemp("mess")
    for name in ("empty", "notes", "broken", "short"):
        (folder / name).mkdir()
    (folder / "notes" / "notes.txt").write_text("no video")
    (folder / "broken" / "text.mp4").write_text("no video")
    (folder / "no_rows.csv").write_text("path,text\n")
    (folder / "blank.txt").write_text("\n \n")
    (folder / "latin.txt").write_bytes("ein K\xe4fer".encode("latin-1"))
    (folder / "file").touch()
    for name in ("a.mp4", "b.mp4"):
        write_video(folder / "short" / name, np.full((5, 32, 32, 3), 77, np.uint8), 8)
    rows = [probing.describe(str(path)) | {"text": "short"} for path in sorted((folder / "short").iterdir())]
    records.write_table(records.pa.Table.from_pylist(rows, schema=records.SCHEMA), folder / "short.parquet")
    shutil.copytree(world, folder / "world")
    return folder


NO_DATA = ("dataset", "meta", "--output={mess}/out/meta.parquet")
VAE, ENCODE, TRAIN, SAMPLE = ("train_vae",), ("dataset", "encode"), ("train",), ("sample",)
FLAGS = {VAE: vae_flags, ENCODE: train_flags, TRAIN: train_flags, SAMPLE: sample_flags}
PROMPT = "--prompt=a red circle"
IMAGE = ("--config.cond_type=i2v_head", "--config.sampling_option.guidance_img=2.0")
CLIP = ("--config.cond_type=v2v_head", *IMAGE[1:], "--config.sampling_option.num_frames=37")


@pytest.mark.parametrize(
    ("line", "more", "message"),
    [
        (NO_DATA, ["--input={mess}/nowhere"], "No data at {mess}/nowhere"),
        (NO_DATA, ["--input={mess}/empty"], "No clips in {mess}/empty"),
        (NO_DATA, ["--input={mess}/notes"], "No clips in {mess}/notes"),
        (NO_DATA, ["--input={mess}/broken"], "None of the 1 clips can be used (1 bad: ffmpeg: "),
        (NO_DATA, ["--input={mess}/no_rows.csv"], "No clips in {mess}/no_rows.csv"),
        (NO_DATA, ["--input={mess}/file"], "Cannot read {mess}/file"),
        (VAE, ["--config.dataset.data_path={mess}/nowhere.parquet"], "Cannot read {mess}/nowhere.parquet"),
        (VAE, ["--config.dataset.data_path={mess}/short.parquet"], "2 shorter than 9 frames (longest: 5)"),
        (VAE, ["--config.validation.data_path={mess}/short.parquet"], "2 shorter than 9 frames (longest: 5)"),
        (VAE, ["--config.loop.num_step=3"], "config.loop has no field 'num_step'; did you mean 'num_steps'?"),
        (VAE, ["--config.model.latent_channels=5"], "model.latent_channels is 4 there and 5 in the config"),
        (ENCODE, ["--config.ae.from_pretrained={mess}"], "holds no checkpoints and no file of weights"),
        (ENCODE, ["--config.ae.latent_channels=5"], "model.latent_channels is 4 there and 5 in the config"),
        (ENCODE, ["--config.encode.posterior=sample"], "{mess}/world/latents is made of other things"),
        (ENCODE, ["--config.encode.motion_score=score"], "names the column 'score', which the table lacks"),
        (ENCODE, ["--config.encode.dtype=float16"], "config.encode.dtype takes 'float32' or 'bfloat16': got 'float16'"),
        (ENCODE, ["--config.t5.from_pretrained={mess}/nowhere"], "there is no folder {mess}/nowhere"),
        (TRAIN, ["--config.latents={mess}/nowhere"], "{mess}/nowhere holds no latents"),
        (
            TRAIN,
            ["--config.encode.posterior=sample"],
            "{mess}/world/latents is made of other things: encode.posterior =",
        ),
        (TRAIN, ["--config.dataset.data_path={mess}/short.parquet"], "is made of other things: other clips; delete it"),
        (TRAIN, ["--config.t5.max_length=12"], "is made of other things: other text encoders; delete it"),
        (TRAIN, ["--config.modle.depth=2"], "config has no field 'modle'; did you mean 'model'?"),
        (TRAIN, ["--config.model.hidden_size=32"], "axes_dim must be even and sum to the head size 8"),
        (TRAIN, ["--config.model.mlp_ratio=2.0"], "model.mlp_ratio is 4.0 there and 2.0 in the config"),
        (TRAIN, ["--config.model.in_channels=32"], "set --config.model.in_channels=16"),
        (TRAIN, ["--config.loop.num_steps=2"], "past num_steps=2"),
        (TRAIN, ["--config.mesh.tensor=3"], "mesh axes must multiply to the 1 devices"),
        (SAMPLE, ["--config.model.mlp_ratio=2.0", PROMPT], "model.mlp_ratio is 4.0 there and 2.0 in the config"),
        (SAMPLE, ["--config.sampling_option.num_frames=8", PROMPT], "1 + 4 n frames: got 8: use 5 or 9"),
        (
            SAMPLE,
            ["--config.cond_type=v2v_heads", PROMPT],
            "'v2v_heads'. Use one of these, the nearest first: v2v_head",
        ),
        (SAMPLE, [*IMAGE, PROMPT], "cond_type i2v_head needs a reference"),
        (SAMPLE, [*IMAGE, PROMPT, "--ref={mess}/a.png"], "The reference {mess}/a.png of 'a red circle' does not exist"),
        (SAMPLE, [*CLIP, PROMPT, "--ref={mess}/short/a.mp4"], "short/a.mp4 has 5 frames, v2v_head needs 33"),
        (SAMPLE, [PROMPT, "--ref={mess}/short/a.mp4"], "cond_type t2v looks at no reference"),
        (SAMPLE, ["--prompts={mess}/blank.txt", "--ref={mess}/short/a.mp4"], "--ref goes with --prompt"),
        (SAMPLE, ["--config.motion_score=dynamic", PROMPT], "motion_score is a whole number from 1 to 15"),
        (SAMPLE, ["--config.use_t2i2v=True", PROMPT], "use_t2i2v needs img_flux"),
        (SAMPLE, ["--config.ae.from_pretrained={mess}/nowhere", PROMPT], "no file or folder '{mess}/nowhere'"),
        (SAMPLE, ["--prompts={mess}/blank.txt"], "The prompt list {mess}/blank.txt is empty"),
        (SAMPLE, ["--prompts={mess}/nowhere.txt"], "The prompt list {mess}/nowhere.txt does not exist"),
        (SAMPLE, ["--prompts={mess}/latin.txt"], "{mess}/latin.txt is not UTF-8 text"),
        (SAMPLE, ["--prompt="], "There is no prompt"),
        (SAMPLE, [], "There is no prompt"),
        (("report",), ["--folder={mess}/nowhere"], "There is no folder {mess}/nowhere"),
    ],
    ids=lambda value: " ".join(value).replace("{mess}/", "") if isinstance(value, tuple | list) else "",
)
def test_bad_input_is_one_line_and_writes_nothing(mess, command, line, more, message):
    name, *arguments = line
    arguments += FLAGS[line](mess / "world") if line in FLAGS else []
    check_refusal(mess, command, name, [*arguments, *more], message)


def check_refusal(mess: Path, command: Command, name: str, arguments: list[str], message: str) -> None:
    before = files(mess)
    errors = command(name, *(argument.format(mess=mess) for argument in arguments), status=1).stderr
    assert errors.rstrip("\n").rpartition("\n")[2].startswith("error: "), errors
    assert message.format(mess=mess) in errors.rpartition("error: ")[2]
    assert "Traceback" not in errors
    assert files(mess) == before


@pytest.mark.parametrize("place", ["{mess}/file/out", "/proc/out/out"])
@pytest.mark.parametrize(
    ("line", "flag"),
    [
        (("dataset", "demo", "--num_clips=2"), "--output={place}"),
        (("dataset", "meta", "--input={mess}/short"), "--output={place}.parquet"),
        (("dataset", "text", "--meta={mess}/short.parquet"), "--output={place}"),
        (VAE, "--config.workdir={place}"),
        (ENCODE, "--config.latents={place}"),
        (TRAIN, "--config.workdir={place}"),
        (SAMPLE, "--config.save_dir={place}"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, tuple) else "",
)
def test_a_folder_that_cannot_be_made_is_one_line(mess, command, line, flag, place):
    name, *arguments = line
    arguments += FLAGS[line](mess / "world") if line in FLAGS else []
    arguments += [PROMPT] if line == SAMPLE else []
    place = place.format(mess=mess)
    check_refusal(mess, command, name, [*arguments, flag.format(place=place)], str(Path(place).parent))


@pytest.fixture
def on_disk(tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """Returns a function that runs a command which sees a disk with mount options at `place`; files at the end."""
    place = tmp_path / "disk"
    place.mkdir()
    script = 'mount -t tmpfs -o $0 disk "$1" && cd "$2" && { "${@:3}"; status=$?; find "$1"; exit $status; }'
    mounted = ["unshare", "--map-root-user", "--mount", "bash", "-c", script]
    if (
        not shutil.which("unshare")
        or subprocess.run([*mounted, "ro", place, ROOT, "true"], capture_output=True).returncode
    ):
        pytest.skip("this machine lets no user mount a disk")

    def run(options: str, name: str, *arguments: str) -> subprocess.CompletedProcess:
        line = [*mounted, options, place, ROOT, sys.executable, "-m", f"opensora_jax.{name}", *arguments]
        return subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=180)

    return run


@pytest.mark.parametrize(
    ("options", "line", "message"),
    [
        ("size=64k", ("dataset", "demo", "--num_clips=2", "--output={disk}/a"), "no space is left on the disk"),
        ("ro", ("dataset", "demo", "--num_clips=2", "--output={disk}/a"), "the file system is read-only"),
        ("size=200k", TRAIN, "no space is left on the disk"),
    ],
)
def test_a_full_or_read_only_disk_is_one_line(world, on_disk, tmp_path, options, line, message):
    name, *arguments = line
    arguments += train_flags(world, "--config.workdir={disk}/a") if line == TRAIN else []
    process = on_disk(options, name, *(argument.format(disk=tmp_path / "disk") for argument in arguments))
    assert process.returncode == 1, process.stderr
    (error,) = [found for found in process.stderr.splitlines() if found.startswith("error: ")]
    assert error.startswith(f"error: {tmp_path}/disk/a")
    assert message in error
    # The threads in which TensorStore writes a checkpoint may complain besides.
    assert line == TRAIN or "Traceback" not in process.stderr


@pytest.fixture
def videos(tmp_path) -> Path:
    """Returns a folder of real videos of mixed sizes and rates: one is turned, one cut short, one damaged."""
    folder = tmp_path / "videos"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (48, 66, 58, 3), np.uint8)
    for name, (frames, height, width), fps in (
        ("a_red_car.mp4", (24, 48, 58), 8),
        ("b.mp4", (40, 66, 40), 29.97),
        ("c.mp4", (48, 36, 58), 60),
        ("damaged.mp4", (30, 40, 40), 24),
    ):
        write_video(folder / name, noise[:frames, :height, :width], fps)
    (folder / "b.txt").write_text("a blue boat")
    turn = [binary(), "-nostdin", "-loglevel", "error", "-display_rotation", "90"]
    turn += ["-i", str(folder / "a_red_car.mp4"), "-c", "copy", str(folder / "turned.mp4")]
    subprocess.run(turn, check=True, timeout=60)
    whole = (folder / "damaged.mp4").read_bytes()
    (folder / "damaged.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "cut.mp4").write_bytes(whole[:700])
    return folder


def test_videos_of_mixed_kinds_train_and_sample(videos, command, tmp_path):
    out = tmp_path / "out"
    described = command("dataset", "meta", f"--input={videos}", f"--output={out}/meta.parquet").stdout
    assert f", first {videos}/cut.mp4" in described
    command("dataset", "text", f"--meta={out}/meta.parquet", f"--output={out}/text")
    command("train_vae", *vae_flags(out, "--config.validation.data_path=", "--config.loop.num_steps=5"))
    command("dataset", "encode", *train_flags(out))
    command("train", *train_flags(out, "--config.loop.num_steps=3"))
    table = [f"--config.dataset.data_path={out}/meta.parquet", "--config.num_samples=2"]
    command("sample", *sample_flags(out, *table))
    command("report", f"--folder={out}")
    assert {path.name for path in out.glob("samples/*.mp4")} == {"0000_a-red-car.mp4", "0001_a-blue-boat.mp4"}


MIXED_CONFIG = """
from configs.diffusion.train import demo

def get_config():
    config = demo.get_config()
    config.bucket_config = {"32px_ar1:1": {9: (1.0, 8), 1: (1.0, 4)}}
    return config
"""


def make_mixture(folder: Path, count: int) -> tuple[int, int]:
    """Writes `count` files, copies of a few videos and images and every tenth of them bad; returns how many are.

    Among the good ones are rotated ones, others of a variable rate or an odd size, and some without a caption. Every
    twentieth looks fine until it is decoded; the second number is that of these.
    """
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 66, 3), np.uint8)
    shapes = ((24, 48, 58, 8.0), (40, 60, 40, 29.97), (60, 36, 58, 60.0), (1, 50, 66, 1.0), (12, 36, 36, 24.0))
    good = [write_video(folder / f"g{n}.mp4", noise[:t, :h, :w], fps) for n, (t, h, w, fps) in enumerate(shapes)]
    good += [folder / f"{name}.mp4" for name in ("rotated", "variable", "odd")]
    ffmpeg("-display_rotation", "90", "-i", good[0], "-c", "copy", good[5])
    ffmpeg("-i", good[1], "-vf", "select=not(between(n\\,3\\,7))", "-fps_mode", "passthrough", good[6])
    ffmpeg("-f", "lavfi", "-i", "testsrc=s=57x35:r=8:d=2", "-c:v", "libx264", "-pix_fmt", "yuv444p", good[7])
    ffmpeg("-f", "lavfi", "-i", "sine=duration=1", folder / "sound.m4a")
    whole, sound = good[0].read_bytes(), (folder / "sound.m4a").read_bytes()
    bad = (b"", whole[:700], b"no video", sound, b"\x00" * 5000)
    for number in range(count):
        path = good[number % len(good)]
        name = folder / f"{number:03d}_a_clip{path.suffix}"
        if number % 10 == 9:
            name.with_suffix(".mp4").write_bytes(bad[number // 10 % len(bad)])
        elif number % 20 == 0:
            data = path.read_bytes()
            name.write_bytes(data[: len(data) // 4] + b"\x55" * (len(data) // 2) + data[-(len(data) // 4) :])
        else:
            shutil.copy(path, name)
        if number % 7 == 0:
            name.with_suffix(".txt").write_text("")
    for path in (*good, folder / "sound.m4a"):
        path.unlink()
    return count // 10, count // 20


def ffmpeg(*arguments: str | Path) -> None:
    subprocess.run([binary(), "-nostdin", "-loglevel", "error", *map(str, arguments)], check=True, timeout=60)


def test_200_files_of_which_a_tenth_is_bad_go_from_meta_to_training(world, command, tmp_path):
    count, out = 200, tmp_path / "out"
    bad, damaged = make_mixture(tmp_path / "clips", count)
    (tmp_path / "config.py").write_text(MIXED_CONFIG)
    described = command("dataset", "meta", f"--input={tmp_path}/clips", f"--output={out}/meta.parquet").stdout
    assert f"{count - bad} of {count} clips are usable" in described
    assert "26 without a caption, first " in described
    assert "with a variable frame rate, first " in described
    (tmp_path / "clips" / "001_a_clip.mp4").unlink()
    sharded = command("dataset", "shard", f"--meta={out}/meta.parquet", f"--output={out}/clips", "--shard_mb=1").stdout
    assert f"{count - bad - 1} clips in" in sharded
    assert "left out, 1" in sharded
    shutil.rmtree(tmp_path / "clips")  # from here on the shards are enough
    flags = [
        f"--config={tmp_path}/config.py",
        *train_flags(world, f"--config.dataset.data_path={out}/clips/meta.parquet")[1:],
    ]
    flags += [f"--config.latents={out}/latents", f"--config.workdir={out}/run", "--config.dataset.max_bad_rate=0.2"]
    encoded = command("dataset", "encode", *flags).stdout
    assert sum(map(int, re.findall(r"left out: (\d+) of the clips: ", encoded))) == damaged
    trained = command("train", *flags, "--config.loop.num_steps=50", "--config.loop.log_every=10")
    assert "images" not in trained.stderr
    lines = metrics(out / "run")
    assert lines[-1]["step"] == 50
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["replaced_samples"] == 0
    flags += ["--config.latents=", f"--config.workdir={out}/from_clips", "--config.loop.num_steps=3"]
    trained = command("train", *flags, "--config.bucket_config['32px_ar1:1'][1]=(0.0,4)")
    assert metrics(out / "from_clips")[-1]["replaced_samples"] > 0
    assert re.search(r"cannot read \S+_a_clip\.mp4: (ffmpeg: \S|9 frames wanted)", trained.stderr)
