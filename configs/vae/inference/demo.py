"""What the demo's autoencoder makes of clips it has never seen.

    python -m opensora_jax.vae reconstruct --config=configs/vae/inference/demo.py
    python -m opensora_jax.vae stats --config=configs/vae/inference/demo.py
    python -m opensora_jax.vae encode --config=configs/vae/inference/demo.py

Hardware: 2 CPU cores, a minute. Expected: about 29 dB PSNR. `--config.folder=...` moves all inputs and outputs.
"""

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder

from configs.vae.train import demo as train


def get_config() -> ConfigDict:
    folder = FieldReference("outputs/demo")
    trained = train.get_config()
    trained.folder = folder
    return ConfigDict(
        {
            "folder": folder,
            "save_dir": folder + "/vae_samples",
            "dtype": "float32",
            "model": trained.model.to_dict() | {"from_pretrained": folder + "/vae"},
            "lpips": trained.lpips,
            "dataset": trained.dataset.to_dict() | {"data_path": folder + "/held_out.parquet"},
            "bucket_config": {"32px_ar1:1": {9: (1.0, 1)}},
            "encode": {
                "batch_size": 8,
                "posterior": "mode",
                "seed": 0,
                "dtype": placeholder(str),  # of the stored values: that of the model
                "shard_clips": 256,
            },
            "num_samples": placeholder(int),
            "mesh": {"data": -1, "fsdp": 1, "seq": 1, "tensor": 1, "seq_method": "ulysses"},
            "distributed": trained.distributed,
        }
    )
