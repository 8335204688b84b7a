"""Open-Sora 2.0 on latents of the video DC-AE: a 32nd of height and width, a quarter of the frames.

    python -m opensora_jax.train --config=configs/diffusion/train/high_compression.py \\
        --config.model.from_pretrained=outputs/stage1/diffusion

Hardware: a pod, such as a v5p-128 (64 chips: 2 x 32 of data and fsdp).
Source: hpcaitech/Open-Sora, `configs/diffusion/train/high_compression.py`: its batches, in two parts (and so 2 videos
of 68 to 96 frames in place of 3).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs.diffusion.inference import high_compression
from configs.diffusion.train import image
from configs.diffusion.train.image import rows


def get_config() -> ConfigDict:
    config = image.get_config()
    published = high_compression.get_config()
    config.folder = "outputs/high_compression"
    config.model = published.model
    config.model.update(strict_load=False, grad_ckpt_settings=(100, 100), remat_policy="save_attention")
    config.model.from_pretrained = placeholder(str)  # to start from: a workdir or a published file
    config.ae = published.ae
    config.dataset.spatial_unit = 32
    config.condition_config.update(t2v=1.0, i2v_head=7.0)
    config.bucket_config = {
        "768px": {1: (1.0, 10)} | rows(1.0, (16, 32, 4), (36, 64, 2), (68, 128, 1)),
    }
    config.accumulation_steps = 2
    config.preview.sampling_option = published.sampling_option
    config.optim.lr = 3e-5
    config.loop.ckpt_every = 250
    return config
