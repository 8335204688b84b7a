"""The published video DC-AE on 512 x 512 clips of your own: 32 x 32 pixels and four frames for a latent position.

    python -m opensora_jax.vae reconstruct --config=configs/vae/inference/video_dc_ae.py \\
        --config.dataset.data_path=meta.parquet

Hardware: as hunyuanvideo_vae.py. Weights: hpcai-tech/Open-Sora-v2-Video-DC-AE in ./ckpts.
Source: hpcaitech/Open-Sora, `configs/vae/inference/video_dc_ae.py`.
"""

from ml_collections import ConfigDict

from configs.diffusion.inference import high_compression
from configs.vae.inference import hunyuanvideo_vae as base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.save_dir = "samples/video_dc_ae"
    config.model = high_compression.get_config().ae
    config.model.from_pretrained = config.get_ref("folder") + "/F32T4C128_AE.safetensors"
    config.dataset.spatial_unit = 32
    config.bucket_config = {"512px_ar1:1": {96: (1.0, 1)}}
    return config
