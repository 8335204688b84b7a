"""Open-Sora 2.0, stage 1 with images as conditions: first frame, last frame, or both.

    python -m opensora_jax.train --config=configs/diffusion/train/stage1_i2v.py \\
        --config.model.from_pretrained=outputs/stage1/diffusion

Hardware: as stage1. Encode the latents with this config: shown images are cached beside them.
Source: hpcaitech/Open-Sora, `configs/diffusion/train/stage1_i2v.py`.
"""

from ml_collections import ConfigDict

from configs.diffusion.train import stage1


def get_config() -> ConfigDict:
    config = stage1.get_config()
    config.folder = "outputs/stage1_i2v"
    config.model.cond_embed = True
    config.condition_config.update(t2v=1.0, i2v_head=5.0, i2v_loop=1.0, i2v_tail=1.0)
    config.optim.lr = 1e-5
    return config
