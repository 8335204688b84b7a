"""Open-Sora 2.0, stage 1: videos of up to 129 frames at 256px, images up to 1024px.

    python -m opensora_jax.train --config=configs/diffusion/train/stage1.py \\
        --config.model.from_pretrained=outputs/image/diffusion

Hardware: a pod, such as a v5p-128 (64 chips: 2 x 32 of data and fsdp).
Source: hpcaitech/Open-Sora, `configs/diffusion/train/stage1.py`.
"""

from ml_collections import ConfigDict

from configs.diffusion.train import image
from configs.diffusion.train.image import rows


def get_config() -> ConfigDict:
    config = image.get_config()
    config.folder = "outputs/stage1"
    config.bucket_config = {
        "256px": {1: (1.0, 45)} | rows(1.0, (5, 33, 12), (37, 65, 6), (69, 97, 4), (101, 129, 3)),
        "768px": {1: (0.5, 13)},
        "1024px": {1: (0.5, 7)},
    }
    config.preview.sampling_option.num_frames = 33
    config.optim.lr = 5e-5
    config.loop.ckpt_every = 2000
    return config
