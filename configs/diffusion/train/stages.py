"""The stages of Open-Sora 2.0 in a row: each starts from the weights of the one before.

    python -m opensora_jax.train --config=configs/diffusion/train/stages.py \\
        --config.image.model.from_pretrained=ckpts/flux1-dev.safetensors --config.image.model.layout=flux

Fields of a stage are set under its name, as in `--config.stage1.optim.lr=1e-5`; `--config.stages` names those to run,
in their order. The same command again goes on in the stage that is not finished.
Hardware and source: as in the configs of the stages.
"""

from ml_collections import ConfigDict

from configs.diffusion.train import image, stage1, stage2, stage2_i2v


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "stages": ("image", "stage1", "stage2", "stage2_i2v"),
            "image": image.get_config(),
            "stage1": stage1.get_config(),
            "stage2": stage2.get_config(),
            "stage2_i2v": stage2_i2v.get_config(),
        }
    )
