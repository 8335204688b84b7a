"""A small MMDiT on the cached latents of the demo set, through the code that trains 11B parameters.

    python -m opensora_jax.dataset encode --config=configs/diffusion/train/demo.py
    python -m opensora_jax.train --config=configs/diffusion/train/demo.py

Hardware: 2 CPU cores, 5 minutes. Expected: held-out prompts get the right colour and direction.
`--config.folder=...` moves all inputs and outputs of the demo at once.
"""

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder

from configs.vae.train import demo as vae

# Collectives run on the chips' SparseCores, beside products. For tpu7x the compiler does so by itself, for v5p and v6e
# if it is told to; for chips without SparseCores (v5e) it takes no notice.
ON_SPARSE_CORES = {
    f"xla_tpu_enable_sparse_core_collective_offload_{kind}": True
    for kind in ("all_gather", "2d_all_gather", "reduce_scatter", "all_reduce")
}


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
                "rename_keys": (),
                "strict_load": True,
                "layout": "same",
                "adapter": placeholder(str),  # folder of a LoRA that is merged into the weights
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
            # resolution: {frames: (probability, batch size, or "auto": the largest that fits)}
            "bucket_config": {"32px_ar1:1": {9: (1.0, 16)}},
            # what "auto" may take of a device (memory_gib: what it says), and the most samples of a data shard
            "auto_batch": {"memory_gib": placeholder(float), "headroom": 0.05, "largest": 1024},
            "loader": {"num_workers": 2, "prefetch": 2},  # clips decoded at a time, batches read ahead; per host
            "small_buckets": "repeat",
            "flow": {"time_sampling": "logit_normal", "stratified": True, "flow_shift": 1.0},
            # weights; those above 0 for i2v want the latents encoded with the same config
            "condition_config": {"t2v": 1.0, "i2v_head": 0.0, "i2v_loop": 0.0, "i2v_tail": 0.0},
            "no_i2v_ref_loss": False,
            "guidance": placeholder(float),  # for models with guidance_embed
            # The loss on other clips, a cache of theirs or their table, every so many steps (0: never), at fixed times
            "validation": {
                "every": 0,
                "latents": "",
                "data_path": "",
                "batches": 16,
                "times": (0.1, 0.3, 0.5, 0.7, 0.9),
            },
            # Videos of these prompts, every so many steps (0: never)
            "preview": {
                "every": 0,
                "prompts": (
                    "a red circle moves up on a dark background",
                    "a blue square moves left on a light background",
                ),
                "fps_save": 8.0,
                "decode_batch_size": 8,
                "sampling_option": {
                    "resolution": "32px",
                    "aspect_ratio": "1:1",
                    "height": placeholder(int),
                    "width": placeholder(int),
                    "num_frames": 9,
                    "num_steps": 25,
                    "shift": True,
                    "flow_shift": 1.0,  # as in training: three latent frames of 16 tokens need no shift
                    "guidance": 3.0,
                    "guidance_img": placeholder(float),
                    "text_osci": False,
                    "image_osci": False,
                    "scale_temporal_osci": False,
                    "method": "i2v",
                    "seed": 42,
                },
            },
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
            "compiler_options": {"tpu": ON_SPARSE_CORES},  # of the compiler for a platform: names and values
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
                "on_full_disk": "stop",  # or go_on, without that checkpoint
                "profile": {"at": 0, "steps": 3},  # the step to profile from (0: none; SIGUSR1: now), and how many
                "wandb": {"project": "", "name": ""},  # "": no Weights & Biases; the workdir's name
            },
        }
    )
