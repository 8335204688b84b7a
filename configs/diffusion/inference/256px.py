r"""Samples 129 frames at 256px with the published 11B model; base of the other presets with published weights.

    python -m opensora_jax.sample --config=configs/diffusion/inference/256px.py --prompt="raining, sea"
    python -m opensora_jax.sample --config=configs/diffusion/inference/256px.py --prompt="..." \
        --config.cond_type=i2v_head --ref=first.png

Hardware: accelerators with room for the parameters (22.2 GiB denoiser, 8.9 GiB T5) and for activations: a video is
decoded in tiles of at most 256 x 256 pixels, each with all frames (docs/vae.md). All devices share the layers
(`mesh.tensor`); `batch_size` has to grow with `mesh.data`.
Weights: hpcai-tech/Open-Sora-v2 in ./ckpts (docs/weights.md); `--config.folder=...` names another folder.
Expected: samples/0000_raining-sea.mp4, 192 x 336 pixels at 24 frames a second, after 80 forward passes.
Source: hpcaitech/Open-Sora, `configs/diffusion/inference/256px.py`; its seed is drawn anew in each run.
"""

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    folder = FieldReference("./ckpts")
    return ConfigDict(
        {
            "folder": folder,
            "save_dir": "samples",
            "batch_size": 1,
            "decode_batch_size": 1,
            "dtype": "bfloat16",
            "cond_type": "t2v",
            "dataset": {"data_path": placeholder(str)},
            "start_index": 0,
            "num_samples": placeholder(int),
            "num_sample": 1,
            "sampling_option": {
                "resolution": "256px",
                "aspect_ratio": "16:9",
                "height": placeholder(int),
                "width": placeholder(int),
                "num_frames": 129,
                "num_steps": 50,
                "shift": True,
                "flow_shift": placeholder(float),
                "guidance": 7.5,
                "guidance_img": 3.0,
                "text_osci": True,
                "image_osci": True,
                "scale_temporal_osci": True,
                "method": "i2v",
                "seed": 42,  # so that a second run keeps what the first one made
            },
            "add_fps_to_text": True,
            "motion_score": "4",
            "fps_save": 24.0,
            "mesh": {"data": 1, "fsdp": 1, "seq": 1, "tensor": -1, "seq_method": "ulysses"},
            "distributed": {  # process 0's host:port, the number of processes, this one's; None: ask the cluster
                "coordinator_address": placeholder(str),
                "num_processes": placeholder(int),
                "process_id": placeholder(int),
            },
            "model": {
                "type": "mmdit",
                "from_pretrained": folder + "/Open_Sora_v2.safetensors",
                "rename_keys": (),
                "strict_load": True,
                "layout": "same",
                "adapter": placeholder(str),  # folder of a LoRA that is merged into the weights
                "in_channels": 64,  # 16 latent channels x 2 x 2
                "vec_in_dim": 768,
                "context_in_dim": 4096,
                "hidden_size": 3072,
                "mlp_ratio": 4.0,
                "num_heads": 24,
                "depth": 19,
                "depth_single_blocks": 38,
                "axes_dim": (16, 56, 56),
                "theta": 10_000,
                "qkv_bias": True,
                "guidance_embed": False,
                "cond_embed": True,
                "fused_qkv": False,
                "use_liger_rope": True,
                "patch_size": 2,
                "grad_ckpt_settings": (0, 0),
                "remat_policy": "full",
            },
            "ae": {
                "type": "hunyuan_vae",
                "from_pretrained": folder + "/hunyuan_vae.safetensors",
                "rename_keys": (),
                "strict_load": True,
                "layout": "same",
                "in_channels": 3,
                "out_channels": 3,
                "latent_channels": 16,
                "block_out_channels": (128, 256, 512, 512),
                "layers_per_block": 2,
                "norm_num_groups": 32,
                "time_compression_ratio": 4,
                "spatial_compression_ratio": 8,
                "mid_block_add_attention": True,
                "scale_factor": 0.476986,
                "shift_factor": 0.0,
                "use_spatial_tiling": True,
                "use_temporal_tiling": False,
                "sample_size": 256,  # a tile, in pixels
                "sample_tsize": 64,  # a tile, in frames
                "tile_overlap_factor": 0.25,
            },
            "t5": {"from_pretrained": folder + "/google/t5-v1_1-xxl", "max_length": 512},
            "clip": {"from_pretrained": folder + "/openai/clip-vit-large-patch14", "max_length": 77},
            # Text to image to video: t2i2v_256px.py
            "use_t2i2v": False,
            "img_flux": None,
            "img_flux_ae": None,
            "img_resolution": placeholder(str),
        }
    )
