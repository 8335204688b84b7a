"""Open-Sora 2.0, stage 1: videos of up to 129 frames at 256px, images up to 1024px.

    python -m opensora_jax.train --config=configs/diffusion/train/stage1.py \\
        --config.model.from_pretrained=outputs/image/diffusion

Hardware: a pod, such as a v5p-128 (64 chips: 2 x 32 of data and fsdp).
Source: hpcaitech/Open-Sora, `configs/diffusion/train/stage1.py`: its batches, in three parts (and so 3 videos of 69 to
97 frames in place of 4, 12 images of 768px in place of 13, 6 of 1024px in place of 7).
"""

from ml_collections import ConfigDict

from configs.diffusion.train import image
from configs.diffusion.train.image import rows


def get_config() -> ConfigDict:
    config = image.get_config()
    config.folder = "outputs/stage1"
    config.bucket_config = {
        "256px": {1: (1.0, 15)} | rows(1.0, (5, 33, 4), (37, 65, 2), (69, 129, 1)),
        "768px": {1: (0.5, 4)},
        "1024px": {1: (0.5, 2)},
    }
    config.preview.sampling_option.num_frames = 33
    config.optim.lr = 5e-5
    config.loop.ckpt_every = 2000
    return config
