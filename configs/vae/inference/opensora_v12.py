"""The published autoencoder of Open-Sora 1.2 on 512 x 512 clips of your own: chunks of 17 frames to 5 latent frames.

    python -m opensora_jax.vae reconstruct --config=configs/vae/inference/opensora_v12.py \\
        --config.dataset.data_path=meta.parquet

Hardware: as hunyuanvideo_vae.py; memory is that of a chunk of 17 frames.
Weights: hpcai-tech/OpenSora-VAE-v1.2 in ./ckpts/OpenSora-VAE-v1.2 (docs/weights.md).
Source: hpcaitech/Open-Sora, branch opensora/v1.2, `OpenSoraVAE_V1_2` in `opensora/models/vae/vae.py`; SDXL's image
autoencoder for `vae_2d`.
"""

from ml_collections import ConfigDict

from configs.vae.inference import hunyuanvideo_vae as base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.save_dir = "samples/opensora_v12"
    config.model = {
        "type": "opensora_vae",
        "from_pretrained": config.get_ref("folder") + "/OpenSora-VAE-v1.2",
        "rename_keys": (),
        "strict_load": True,
        "layout": "same",
        "vae_2d": {
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": (128, 256, 512, 512),
            "layers_per_block": 2,
            "latent_channels": 4,
            "norm_num_groups": 32,
        },
        "vae_temporal": {
            "in_out_channels": 4,
            "latent_embed_dim": 4,
            "embed_dim": 4,
            "filters": 128,
            "num_res_blocks": 4,
            "channel_multipliers": (1, 2, 2, 4),
            "temporal_downsample": (False, True, True),
            "num_groups": 32,
        },
        "micro_frame_size": 17,  # frames at a time
        "micro_batch_size": 4,  # images at a time
        "shift": (-0.10, 0.34, 0.27, 0.98),
        "scale": (3.85, 2.32, 2.33, 3.06),
    }
    config.dataset.fps_max = 24.0
    config.bucket_config = {"512px_ar1:1": {51: (1.0, 1)}}
    return config
