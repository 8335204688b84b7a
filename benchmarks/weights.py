"""Memory and time of importing and exporting weights: `python benchmarks/weights.py --billions=1.2`.

Writes a synthetic set of shards in bfloat16 with the keys and shapes of a smaller Open-Sora v2, then runs the commands
that users run, each in a process of its own, and prints what each took beside the size of the weights.
"""

import argparse
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
from flax import nnx

from opensora_jax.config.build import build
from opensora_jax.config.flag import load_config
from opensora_jax.models.mmdit import MMDiT, MMDiTConfig
from opensora_jax.weights.files import save_safetensors
from opensora_jax.weights.pretrained import DENOISERS, parse_model
from opensora_jax.weights.rename import published_shapes

CONFIG = "configs/diffusion/inference/256px.py"
SHARDS = 4


@dataclasses.dataclass(frozen=True)
class Noise:
    """A tensor of random values, made when it is written."""

    shape: tuple[int, ...]
    seed: int
    dtype = np.dtype(ml_dtypes.bfloat16)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        values = np.random.default_rng(self.seed).standard_normal(self.shape, np.float32)
        return (0.02 * values).astype(self.dtype)


def smaller(billions: float) -> MMDiTConfig:
    """Returns Open-Sora v2 at half its width, with as many layers as make `billions` of parameters."""
    _, config = parse_model(load_config(CONFIG).model, DENOISERS, "config.model")
    fields = dataclasses.asdict(config) | {"hidden_size": config.hidden_size // 2, "num_heads": config.num_heads // 2}
    for depth in range(1, 100):
        made = build(MMDiTConfig, fields | {"depth": depth, "depth_single_blocks": 2 * depth}, "config")
        if sum(map(math.prod, shapes_of(made).values())) >= billions * 1e9:
            return made
    raise SystemExit("--billions is at most that of 100 layers")


def shapes_of(config: MMDiTConfig) -> dict[str, tuple[int, ...]]:
    """Returns the published keys and shapes of a network."""
    return published_shapes("mmdit", nnx.state(nnx.eval_shape(lambda: MMDiT(config, rngs=nnx.Rngs(0))), nnx.Param))


def write_shards(folder: Path, shapes: dict[str, tuple[int, ...]]) -> float:
    """Writes the file set and returns its size in GB."""
    files: dict[str, str] = {}
    for shard in range(SHARDS):
        name = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        tensors = {key: Noise(shapes[key], i) for i, key in enumerate(shapes) if i % SHARDS == shard}
        save_safetensors(folder / name, tensors)
        files |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return sum(2 * math.prod(shape) for shape in shapes.values()) / 1e9


def convert(folder: Path, devices: int, *arguments: str) -> dict:
    """Runs a convert command and returns its line in the folder's runs.jsonl."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "TQDM_DISABLE": "1",
    }
    line = [sys.executable, "-m", "opensora_jax.convert", *arguments]
    subprocess.run(line, check=True, env=environment, stdout=subprocess.DEVNULL)
    return json.loads((folder / "runs.jsonl").read_text().splitlines()[-1])


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--billions", type=float, default=1.0, help="parameters")
    parser.add_argument("--folder", default=None, help="for the files: three times the size of the weights")
    given = parser.parse_args()
    config = smaller(given.billions)
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        (folder / "published").mkdir()
        size = write_shards(folder / "published", shapes_of(config))
        changed = {"hidden_size", "num_heads", "depth", "depth_single_blocks"}
        fields = [f"--config.model.{field}={getattr(config, field)}" for field in sorted(changed)]
        print(f"{'command':<28}{'weights GB':>12}{'peak GB':>10}{'ratio':>8}{'seconds':>10}")
        for devices in (1, 8):
            out = folder / f"imported{devices}"
            mesh = ["--config.mesh.fsdp=-1", "--config.mesh.tensor=1"]
            source = [f"--config={CONFIG}", f"--input={folder / 'published'}"]
            took = convert(out, devices, "import", *source, *fields, *mesh, f"--output={out}")
            report(f"import, {devices} device(s)", size, took)
        workdir = f"--input={folder / 'imported8'}"
        for devices in (1, 8):
            out = folder / f"again{devices}"
            arguments = [f"--config={CONFIG}", workdir, "--dtype=bfloat16", *fields, *mesh, f"--output={out}"]
            took = convert(out, devices, "import", *arguments)
            report(f"of a workdir, {devices} device(s)", size, took)
            shutil.rmtree(out)
        for layout in ("same", "flux"):
            took = convert(folder, 1, "export", workdir, f"--output={folder / 'out.safetensors'}", f"--layout={layout}")
            report(f"export, layout {layout}", size, took)


def report(name: str, size: float, took: dict) -> None:
    """Prints a row."""
    peak = took["peak_memory_bytes"] / 1e9
    print(f"{name:<28}{size:>12.2f}{peak:>10.2f}{peak / size:>8.2f}{took['seconds']:>10.1f}", flush=True)


if __name__ == "__main__":
    main()
