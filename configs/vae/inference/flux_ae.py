"""The published image autoencoder of Flux on 512 x 512 images of your own; videos need a line of their own.

    python -m opensora_jax.vae reconstruct --config=configs/vae/inference/flux_ae.py \\
        --config.dataset.data_path=meta.parquet

Hardware: an accelerator; images are split over all devices in space. It takes clips of any length, frame by frame, with
memory for all frames at once, where a line says so: "--config.bucket_config['512px_ar1:1']={9: (1.0, 1)}".
Weights: flux1-dev-ae.safetensors in ./ckpts (docs/weights.md).
Source: hpcaitech/Open-Sora, `configs/diffusion/inference/plugins/t2i2v.py` (img_flux_ae).
"""

from ml_collections import ConfigDict

from configs.diffusion.inference import t2i2v_256px
from configs.vae.inference import hunyuanvideo_vae as base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.save_dir = "samples/flux_ae"
    config.model = t2i2v_256px.get_config().img_flux_ae
    config.model.from_pretrained = config.get_ref("folder") + "/flux1-dev-ae.safetensors"
    config.bucket_config = {"512px_ar1:1": {1: (1.0, 1)}}
    config.encode.batch_size = 4
    return config
