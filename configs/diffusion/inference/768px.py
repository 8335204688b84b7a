"""256px.py at nine times the pixels: 576 x 1024 at 16:9, 129 frames.

    python -m opensora_jax.sample --config=configs/diffusion/inference/768px.py --prompt="raining, sea"

Hardware: as 256px.py; a video is 76,544 tokens, which devices that hold all weights share with `mesh.tensor=1` and
`mesh.seq=...` (docs/sample.md).
Weights: as 256px.py. Source: hpcaitech/Open-Sora, `configs/diffusion/inference/768px.py`.
"""

from importlib import import_module

from ml_collections import ConfigDict

base = import_module("configs.diffusion.inference.256px")  # no name that `import` could spell


def get_config() -> ConfigDict:
    config = base.get_config()
    config.sampling_option.resolution = "768px"
    return config
