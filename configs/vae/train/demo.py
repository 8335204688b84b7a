"""A small causal video autoencoder for the demo set, through the code that trains the large ones.

    python -m opensora_jax.train_vae --config=configs/vae/train/demo.py

Hardware: 2 CPU cores, 6 minutes. Expected: about 29 dB PSNR on held-out clips (see validation.json).
`--config.folder=...` moves all inputs and outputs of the demo at once.
"""

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    folder = FieldReference("outputs/demo")
    return ConfigDict(
        {
            "folder": folder,
            "workdir": folder + "/vae",
            "seed": 0,
            "dtype": "float32",
            "model": {
                "type": "hunyuan_vae",
                "from_pretrained": placeholder(str),  # to start from: a workdir or a published file
                "rename_keys": (),
                "strict_load": True,
                "in_channels": 3,
                "out_channels": 3,
                "latent_channels": 8,
                "block_out_channels": (8, 16, 32),
                "layers_per_block": 1,
                "norm_num_groups": 4,
                "time_compression_ratio": 4,
                "spatial_compression_ratio": 4,
                "mid_block_add_attention": True,
                "scale_factor": 1.0,
                "shift_factor": 0.0,
            },
            "dataset": {
                "data_path": folder + "/meta.parquet",
                "fps_max": 24.0,
                "spatial_unit": 8,
                "resize": "ffmpeg",  # antialiased; "original": the arithmetic of Open-Sora 2.0
                "cache_bytes": 1 << 30,
                "max_bad_rate": 0.05,
            },
            # The first steps see single frames: colours and shapes are learnt there at a third of the cost.
            "images": {"steps": 500, "frames": 4},
            # Without a table of their own, up to `clips` rows of the training table are held out.
            "validation": {"data_path": folder + "/held_out.parquet", "clips": 48, "latent_clips": 256},
            # resolution: {frames: (probability, batch size)}
            "bucket_config": {"32px_ar1:1": {9: (1.0, 4)}},
            "loader": {"num_workers": 2, "prefetch": 2},  # clips decoded at a time, batches read ahead; per host
            "small_buckets": "repeat",  # a handful of videos is enough to try
            "vae_loss_config": {
                "l1_loss_weight": 0.0,
                "l2_loss_weight": 1.0,
                "kl_loss_weight": 1e-3,
                "perceptual_loss_weight": 0.0,  # with a weight, LPIPS is read from `lpips`
                "logvar_init": 0.0,
                "reduction": "mean",
            },
            "lpips": {"type": "lpips", "from_pretrained": placeholder(str), "widths": (64, 128, 256, 512, 512)},
            "optim": {
                "cls": "muon",
                "lr": 0.04,
                "betas": (0.9, 0.99),
                "eps": 1e-8,
                "weight_decay": 0.0,
                "grad_clip": 1.0,
                "warmup_steps": 20,
                "lr_schedule": "cosine",
                "moments_dtype": "float32",
                "freeze": (),  # published names of parameters, or of modules, that stay as they are
            },
            "ema_decay": 0.99,
            "mesh": {"data": -1, "fsdp": 1, "seq": 1, "tensor": 1, "seq_method": "ulysses"},
            "distributed": {  # process 0's host:port, the number of processes, this one's; None: ask the cluster
                "coordinator_address": placeholder(str),
                "num_processes": placeholder(int),
                "process_id": placeholder(int),
            },
            "loop": {
                "num_steps": 1050,
                "log_every": 10,
                "ckpt_every": 150,
                "keep_n_latest": 2,
                "keep_every": 0,  # keep every so many steps' checkpoint for good; 0: none
                "max_skipped": 10,  # updates with a loss or gradient that is not finite
                "on_full_disk": "stop",  # or go_on, without that checkpoint
                "profile": {"at": 0, "steps": 3},  # the step to profile from (0: none; SIGUSR1: now), and how many
                "wandb": {"project": "", "name": ""},  # "": no Weights & Biases; the workdir's name
            },
        }
    )
