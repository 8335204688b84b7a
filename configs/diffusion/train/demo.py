"""A small MMDiT on the cached latents of the demo set, through the code that trains 11B parameters.

    python -m opensora_jax.dataset encode --config=configs/diffusion/train/demo.py
    python -m opensora_jax.train --config=configs/diffusion/train/demo.py

Hardware: 2 CPU cores, 4 minutes. Expected: held-out prompts get the right colour and direction.
`--config.folder=...` moves all inputs and outputs of the demo at once.
"""

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder

from configs.vae.train import demo as vae


def get_config() -> ConfigDict:
    folder = FieldReference("outputs/demo")
    autoencoder = vae.get_config()
    autoencoder.folder = folder
    return ConfigDict(
        {
            "folder": folder,
            "workdir": folder + "/diffusion",
            "seed": 0,
            "dtype": "float32",
            "model": {
                "type": "mmdit",
                "from_pretrained": placeholder(str),  # to start from: a workdir or a published file
                "rename_keys": {},
                "strict_load": True,
                "layout": "same",
                "in_channels": 32,  # 8 latent channels x 2 x 2
                "vec_in_dim": 64,
                "context_in_dim": 64,
                "hidden_size": 192,
                "mlp_ratio": 4.0,
                "num_heads": 4,
                "depth": 2,
                "depth_single_blocks": 4,
                "axes_dim": (16, 16, 16),
                "theta": 100,  # a grid of 3x4x4 tokens: slow rotations would tell no places apart
                "qkv_bias": True,
                "guidance_embed": False,
                "cond_embed": True,
                "fused_qkv": False,
                "use_liger_rope": True,
                "patch_size": 2,
                "grad_ckpt_settings": (0, 0),  # blocks that recompute their activations: none needed at this size
                "remat_policy": "full",  # what those keep: full (nothing), save_attention, offload
            },
            "ae": autoencoder.model.to_dict() | {"from_pretrained": folder + "/vae"},
            "t5": {"from_pretrained": folder + "/text/t5", "max_length": 16},
            "clip": {"from_pretrained": folder + "/text/clip", "max_length": 16},
            "dataset": autoencoder.dataset.to_dict() | {"data_path": folder + "/meta.parquet"},
            "latents": folder + "/latents",
            "encode": {
                "batch_size": 16,
                "posterior": "mode",
                "seed": 0,
                "dtype": placeholder(str),  # of the stored values: that of the models
                "shard_clips": 256,
                "shard_texts": 256,
                "fps_suffix": False,
                "motion_score": "",
            },
            # resolution: {frames: (probability, batch size)}
            "bucket_config": {"32px_ar1:1": {9: (1.0, 16)}},
            "loader": {"num_workers": 2, "prefetch": 2},  # clips decoded at a time, batches read ahead; per host
            "small_buckets": "repeat",
            "flow": {"time_sampling": "logit_normal", "stratified": True, "flow_shift": 1.0},
            # weights; those above 0 for i2v want the latents encoded with the same config
            "condition_config": {"t2v": 1.0, "i2v_head": 0.0, "i2v_loop": 0.0, "i2v_tail": 0.0},
            "no_i2v_ref_loss": False,
            "guidance": placeholder(float),  # for models with guidance_embed
            "dropout_ratio": {"t5": 0.15, "clip": 0.15},
            "lora": None,  # configs/diffusion/train/lora.py has one
            "optim": {
                "cls": "muon",
                "lr": 0.02,
                "betas": (0.9, 0.99),
                "eps": 1e-8,
                "weight_decay": 0.0,
                "grad_clip": 1.0,
                "warmup_steps": 50,
                "lr_schedule": "cosine",
                "moments_dtype": "float32",
                "freeze": (),  # published names of parameters, or of modules, that stay as they are
            },
            "accumulation_steps": 1,  # parts of a batch that a step takes one after the other
            "ema_decay": 0.99,
            "mesh": {"data": -1, "fsdp": 1, "seq": 1, "tensor": 1, "seq_method": "ulysses"},
            "distributed": autoencoder.distributed,
            "loop": {
                "num_steps": 650,
                "log_every": 10,
                "ckpt_every": 150,
                "keep_n_latest": 2,
                "keep_every": 0,  # keep every so many steps' checkpoint for good; 0: none
                "max_skipped": 10,  # updates with a loss or gradient that is not finite
            },
        }
    )
