"""Two real processes with four devices each train one model: killed at any step, they go on bit for bit."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from opensora_jax.data.cache.cache_key import Identity
from opensora_jax.data.cache.latent_writer import LatentWriter
from opensora_jax.data.cache.latents import CacheInfo
from opensora_jax.data.plan.buckets import Bucket
from opensora_jax.training.metrics import read_metrics
from tests.environment import cpu_devices, free_port

ROOT = Path(__file__).parents[1]
CLIPS, STEPS = 40, 12
SIZE = [
    *(f"--config.model.{field}" for field in ("in_channels=16", "vec_in_dim=5", "context_in_dim=3", "hidden_size=24")),
    *(f"--config.model.{field}" for field in ("axes_dim=(2,2,2)", "depth=1", "depth_single_blocks=1")),
    *(f"--config.loop.{field}" for field in (f"num_steps={STEPS}", "log_every=1", "ckpt_every=2")),
    "--config.bucket_config['32px_ar1:1'][9]=(1.0,1)",
    "--config.optim.cls=adamw",
]


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Path:
    folder, rng = tmp_path_factory.mktemp("hosts") / "latents", np.random.default_rng(0)
    bucket = Bucket("32px_ar1:1", "1:1", 9, 32, 32, 1)
    writer = LatentWriter(folder, CacheInfo("dataset encode", Identity({}, {}), "float32", CLIPS, CLIPS, 1, 1))
    writer.start()
    with writer.writing_texts(0) as texts:
        texts.add("", rng.normal(size=(5, 3)).astype(np.float32), rng.normal(size=5).astype(np.float32))
    with writer.writing_latents(0) as file:
        for row in range(CLIPS):
            file.add(row, bucket, rng.normal(size=(3, 8, 8, 4)).astype(np.float32), text_id=0, fps=8.0, path="")
    return folder


def start(latents: Path, workdir: Path, mesh: tuple[int, int], processes: int = 2, parts: int = 1) -> list:
    """Starts the processes of a run; each writes its messages to a file in the workdir's folder."""
    port = free_port()
    flags = [f"--config.latents={latents}", f"--config.workdir={workdir}", *SIZE]
    flags += [f"--config.mesh.data={mesh[0]}", f"--config.mesh.fsdp={mesh[1]}", f"--config.accumulation_steps={parts}"]
    command = [sys.executable, "-m", "opensora_jax.train", "--config=configs/diffusion/train/demo.py", *flags]
    environment = os.environ | {
        **cpu_devices(mesh[0] * mesh[1] // processes),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "PYTHONPATH": str(ROOT),
    }
    found = []
    for index in range(processes):
        with workdir.with_name(f"{workdir.name}.{index}.log").open("a") as log:
            many = [f"--config.distributed.coordinator_address=localhost:{port}"]
            many += [f"--config.distributed.num_processes={processes}", f"--config.distributed.process_id={index}"]
            line = command + (many if processes > 1 else [])
            found.append(subprocess.Popen(line, cwd=ROOT, env=environment, stdout=log, stderr=log))
    return found


def finish(processes: list[subprocess.Popen], workdir: Path) -> None:
    for index, process in enumerate(processes):
        assert process.wait(timeout=240) == 0, workdir.with_name(f"{workdir.name}.{index}.log").read_text()[-3000:]


def kill_at(step: int, which: int, processes: list[subprocess.Popen], workdir: Path) -> None:
    """Kills one process with -9 when the step is logged, and then the other, as a scheduler would."""
    deadline = time.monotonic() + 240
    while len(read_metrics(workdir / "metrics.jsonl")) < step:
        assert time.monotonic() < deadline
        assert processes[0].poll() is None, workdir.with_name(f"{workdir.name}.0.log").read_text()[-3000:]
        time.sleep(0.02)
    for process in (processes[which], processes[1 - which]):
        process.kill()
        process.wait()


def losses(workdir: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(workdir / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(latents) -> Path:
    workdir = latents.with_name("whole")
    finish(start(latents, workdir, (4, 2)), workdir)
    return workdir


def test_two_processes_killed_at_random_steps_continue_bit_for_bit(latents, whole, tmp_path):
    draw = random.Random(7)
    for _ in range(int(os.environ.get("KILLS", "1"))):
        workdir = tmp_path / "killed"
        kill_at(draw.randrange(1, STEPS - 1), draw.randrange(2), start(latents, workdir, (4, 2)), workdir)
        finish(start(latents, workdir, (4, 2)), workdir)
        assert losses(workdir) == losses(whole)
        workdir.rename(tmp_path / f"killed_{draw.random()}")


@pytest.mark.parametrize(("mesh", "parts"), [((2, 4), 1), ((8, 1), 1), ((1, 1), 8)])
def test_one_process_continues_what_two_began_on_another_mesh(latents, whole, tmp_path, mesh, parts):
    workdir = tmp_path / "moved"
    kill_at(5, 1, start(latents, workdir, (4, 2)), workdir)
    finish(start(latents, workdir, mesh, processes=1, parts=parts), workdir)
    np.testing.assert_allclose(losses(workdir), losses(whole), rtol=1e-5)
    assert json.loads((workdir / "config.json").read_text())["mesh"]["fsdp"] == mesh[1]
