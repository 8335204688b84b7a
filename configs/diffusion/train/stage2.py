"""Open-Sora 2.0, stage 2: videos of up to 129 frames at 256px and 768px, batches or tokens split over 4 devices.

    python -m opensora_jax.train --config=configs/diffusion/train/stage2.py \\
        --config.model.from_pretrained=outputs/stage1/diffusion

Hardware: a pod, such as a v5p-128 (64 chips: 1 x 16 x 4 of data, fsdp and seq); on chips of 32 GB, such as a v6e,
with `--config.model.remat_policy=offload`.
Source: hpcaitech/Open-Sora, `configs/diffusion/train/stage2.py` (256px has no line of 69 frames there either): about
its batches, in two parts, which but for 768px with more than 33 frames are multiples of the 4 devices along `seq`, so
that each has whole samples (docs/parallel.md).
"""

from ml_collections import ConfigDict

from configs.diffusion.train import image
from configs.diffusion.train.image import rows


def get_config() -> ConfigDict:
    config = image.get_config()
    config.folder = "outputs/stage2"
    config.mesh.update(fsdp=16, seq=4)
    config.accumulation_steps = 2
    config.bucket_config = {
        "256px": {1: (1.0, 64)} | rows(1.0, (5, 33, 8), (37, 65, 4), (73, 129, 4)),
        "768px": {1: (1.0, 20)} | rows(1.0, (5, 33, 4), (37, 65, 2), (69, 129, 1)),
    }
    config.preview.sampling_option.num_frames = 33
    config.optim.lr = 5e-5
    config.loop.ckpt_every = 200
    return config
