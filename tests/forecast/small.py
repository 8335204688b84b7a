"""A config small enough to be compiled for a TPU in seconds, and devices made of one CPU to build its programs on."""

from ml_collections import ConfigDict

from configs.diffusion.inference import demo as inference
from configs.diffusion.train import demo as train

MODEL = {
    "hidden_size": 128,
    "num_heads": 2,
    "axes_dim": (16, 24, 24),
    "depth": 1,
    "depth_single_blocks": 1,
    "cond_embed": False,
}


def training() -> ConfigDict:
    config = train.get_config()
    config.model.update(MODEL)
    config.optim.cls = "adamw"
    config.bucket_config = {"32px": {9: (1.0, 4), 1: (0.5, 6)}, "64px_ar1:1": {5: (1.0, 2)}}
    config.mesh.data = 2
    config.mesh.fsdp = 2
    return config


def sampling() -> ConfigDict:
    config = inference.get_config()
    config.model.update(MODEL)
    config.sampling_option.update(num_steps=30, text_osci=True)
    return config
