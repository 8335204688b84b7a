"""Every config in the repository has the fields that its command reads, no more and no fewer, each of its type."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
READERS = {  # folder: module and what reads a config there; a process each, since commands define flags
    "diffusion/train": ("train", "parse_stages(config)"),
    "diffusion/inference": ("sample", "build(SampleConfig, config, 'config')"),
    "vae/train": ("train_vae", "build(TrainVAEConfig, config, 'config')"),
    "vae/inference": ("vae", "build(VAEConfig, config, 'config')"),
}
CODE = """
import sys
from opensora_jax.{module} import *
from opensora_jax.config.build import build
from opensora_jax.config.flag import load_config
for name in sys.argv[1:]:
    config = load_config(name)
    {read}
"""


@pytest.mark.parametrize("folder", READERS)
def test_every_config_is_what_its_command_reads(folder):
    module, read = READERS[folder]
    names = sorted(str(path) for path in (ROOT / "configs" / folder).glob("*.py") if path.stem != "__init__")
    assert names
    line = [sys.executable, "-c", CODE.format(module=module, read=read), *names]
    found = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert not found.returncode, found.stderr[-2000:]
