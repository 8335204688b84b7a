"""The published Hunyuan autoencoder on 512 x 512 clips of your own.

    python -m opensora_jax.vae reconstruct --config=configs/vae/inference/hunyuanvideo_vae.py \\
        --config.dataset.data_path=meta.parquet

Hardware: an accelerator; a clip is split over all devices in space. Weights: hpcai-tech/Open-Sora-v2 in ./ckpts.
Source: hpcaitech/Open-Sora, `configs/vae/inference/hunyuanvideo_vae.py`.
"""

from importlib import import_module

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

presets = import_module("configs.diffusion.inference.256px")


def get_config() -> ConfigDict:
    sampling = presets.get_config()
    folder = sampling.get_ref("folder")
    return ConfigDict(
        {
            "folder": folder,
            "save_dir": "samples/hunyuanvideo_vae",
            "dtype": "bfloat16",
            "model": sampling.ae.to_dict()
            | {"from_pretrained": folder + "/hunyuan_vae.safetensors", "use_temporal_tiling": True},
            "lpips": {"type": "lpips", "from_pretrained": placeholder(str), "widths": (64, 128, 256, 512, 512)},
            "dataset": {
                "data_path": "datasets/meta.parquet",
                "fps_max": 16.0,
                "spatial_unit": 16,
                "resize": "ffmpeg",  # antialiased; "original": the arithmetic of Open-Sora 2.0
                "cache_bytes": 1 << 30,
                "max_bad_rate": 0.05,
            },
            "bucket_config": {"512px_ar1:1": {97: (1.0, 1)}},
            "encode": {
                "batch_size": 1,
                "posterior": "mode",
                "seed": 42,
                "dtype": placeholder(str),  # of the stored values: that of the model
                "shard_clips": 64,
            },
            "num_samples": placeholder(int),
            "mesh": {"data": 1, "fsdp": 1, "seq": 1, "tensor": -1, "seq_method": "ulysses"},
            "distributed": {  # process 0's host:port, the number of processes, this one's; None: ask the cluster
                "coordinator_address": placeholder(str),
                "num_processes": placeholder(int),
                "process_id": placeholder(int),
            },
        }
    )
