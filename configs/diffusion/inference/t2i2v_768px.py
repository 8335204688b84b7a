"""t2i2v_256px.py with videos of 768px, the size of its images.

    python -m opensora_jax.sample --config=configs/diffusion/inference/t2i2v_768px.py --prompt="raining, sea"

Hardware: see 768px.py. Weights: as t2i2v_256px.py.
Source: hpcaitech/Open-Sora, `configs/diffusion/inference/t2i2v_768px.py`.
"""

from ml_collections import ConfigDict

from configs.diffusion.inference import t2i2v_256px as base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.sampling_option.resolution = "768px"
    return config
