"""256px.py at nine times the pixels: 576 x 1024 at 16:9, 129 frames.

    python -m opensora_jax.sample --config=configs/diffusion/inference/768px.py --prompt="raining, sea"

Hardware: attention over 76,544 tokens is written out today, so this size waits for the attention kernels
(docs/sample.md); fewer frames fit sooner (`--config.sampling_option.num_frames=1`).
Weights: as 256px.py. Source: hpcaitech/Open-Sora, `configs/diffusion/inference/768px.py`.
"""

from importlib import import_module

from ml_collections import ConfigDict

base = import_module("configs.diffusion.inference.256px")  # no name that `import` could spell


def get_config() -> ConfigDict:
    config = base.get_config()
    config.sampling_option.resolution = "768px"
    return config
