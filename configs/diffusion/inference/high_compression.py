"""Text to image to video at 768px through the DC-AE: 32 x 32 pixels and four frames for a latent position.

    python -m opensora_jax.sample --config=configs/diffusion/inference/high_compression.py --prompt="raining, sea"

Hardware: 576 tokens a frame and 32 latent frames, about a quarter of 768px.py; parameters as t2i2v_256px.py.
Weights: as t2i2v_256px.py, with Open_Sora_v2_Video_DC_AE.safetensors and F32T4C128_AE.safetensors (docs/weights.md).
Expected: samples/0000_raining-sea_image.png, then samples/0000_raining-sea.mp4 of 125 frames: 128
without the three more that the image stands for.
Source: hpcaitech/Open-Sora, `configs/diffusion/inference/high_compression.py`.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs.diffusion.inference import t2i2v_256px as base


def get_config() -> ConfigDict:
    config = base.get_config()
    folder = config.get_ref("folder")
    config.sampling_option.resolution = "768px"
    config.sampling_option.num_frames = 128
    config.model.from_pretrained = folder + "/Open_Sora_v2_Video_DC_AE.safetensors"
    config.model.in_channels = 128
    config.model.patch_size = 1
    config.ae = {
        "type": "dc_ae",
        "from_pretrained": folder + "/F32T4C128_AE.safetensors",
        "rename_keys": (),
        "strict_load": True,
        "layout": "same",
        "model_name": "dc-ae-f32t4c128",
        "scaling_factor": placeholder(float),  # the original divides by it in training alone
        "use_spatial_tiling": True,
        "use_temporal_tiling": True,
        "spatial_tile_size": 256,
        "temporal_tile_size": 32,
        "tile_overlap_factor": 0.25,
    }
    return config
