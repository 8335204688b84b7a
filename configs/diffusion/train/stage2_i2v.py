"""Open-Sora 2.0, stage 2 with images as conditions: the published weights are of this stage.

    python -m opensora_jax.train --config=configs/diffusion/train/stage2_i2v.py \\
        --config.model.from_pretrained=outputs/stage2/diffusion

Hardware: as stage2. Encode the latents with this config: shown images are cached beside them.
Source: hpcaitech/Open-Sora, `configs/diffusion/train/stage2_i2v.py`: about its batches, as in stage2.
"""

from ml_collections import ConfigDict

from configs.diffusion.train import stage2
from configs.diffusion.train.image import rows


def get_config() -> ConfigDict:
    config = stage2.get_config()
    config.folder = "outputs/stage2_i2v"
    config.model.cond_embed = True
    config.condition_config.update(t2v=1.0, i2v_head=5.0, i2v_loop=1.0, i2v_tail=1.0)
    config.bucket_config = {
        "256px": {1: (1.0, 96)} | rows(1.0, (5, 33, 40), (37, 65, 20), (69, 97, 16), (101, 129, 12)),
        "768px": {1: (0.5, 20)} | rows(0.5, (5, 33, 4), (37, 65, 2), (69, 129, 1)),
    }
    return config
