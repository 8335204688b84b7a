"""The scripts of benchmarks/ still run; what they measure is in docs/performance.md."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest

from opensora_jax.data.loader import LoaderConfig
from opensora_jax.data.media.video_writer import write_video

SCRIPTS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))
WITHOUT_TORCH = [path.stem for path in SCRIPTS if not re.search("^(import|from) torch", path.read_text(), re.MULTILINE)]


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_every_script_imports_what_there_is(name):
    importlib.import_module(f"benchmarks.{name}")


def test_the_loader_is_measured_beside_ffmpeg_on_one_clip(tmp_path):
    data, config = importlib.import_module("benchmarks.data"), LoaderConfig(num_workers=2, prefetch=1)
    path = write_video(tmp_path / "a.mp4", np.full((41, 180, 320, 3), 77, np.uint8), 24)
    table, plan, source = data.prepare([path])
    assert data.by_hand(table, plan, steps=1, threads=2) > 0
    assert data.by_loader(source, plan, 1, config) > 0
    assert len(data.waits(source, plan, 2, config, step_seconds=0.0)) == 1
