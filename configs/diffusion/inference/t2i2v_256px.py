"""Text to image to video: an image of each prompt by Flux-dev, then 256px.py continues it.

    python -m opensora_jax.sample --config=configs/diffusion/inference/t2i2v_256px.py --prompt="raining, sea"

Hardware: as 256px.py; the image model (22.2 GiB) and the video model are held one after the other.
Weights: as 256px.py, and flux1-dev.safetensors and flux1-dev-ae.safetensors beside them (docs/weights.md).
Expected: samples/0000_raining-sea_image.png, then samples/0000_raining-sea.mp4 after 110 forward passes.
Source: hpcaitech/Open-Sora, `configs/diffusion/inference/t2i2v_256px.py` and `plugins/t2i2v.py`.
"""

from importlib import import_module

from ml_collections import ConfigDict

base = import_module("configs.diffusion.inference.256px")


def get_config() -> ConfigDict:
    config = base.get_config()
    folder = config.get_ref("folder")
    config.cond_type = "i2v_head"
    config.use_t2i2v = True
    config.img_resolution = "768px"
    config.img_flux = config.model.to_dict() | {
        "from_pretrained": folder + "/flux1-dev.safetensors",
        "guidance_embed": True,
        "cond_embed": False,
        "fused_qkv": True,
        "use_liger_rope": False,
    }
    config.img_flux_ae = {
        "type": "flux_ae",
        "from_pretrained": folder + "/flux1-dev-ae.safetensors",
        "rename_keys": (),
        "strict_load": True,
        "layout": "same",
        "resolution": 256,
        "in_channels": 3,
        "ch": 128,
        "out_ch": 3,
        "ch_mult": (1, 2, 4, 4),
        "num_res_blocks": 2,
        "z_channels": 16,
        "scale_factor": 0.3611,
        "shift_factor": 0.1159,
    }
    return config
