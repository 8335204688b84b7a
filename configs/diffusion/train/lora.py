"""A LoRA on the published weights, for one GPU or a small slice: all else stays as it is.

    python -m opensora_jax.train --config=configs/diffusion/train/lora.py --config.dataset.data_path=meta.parquet

Encode the latents first (`dataset encode` with the same flags). Hardware: 80 GB, or 8 chips of 16 GB with fsdp=8. The
result, `outputs/lora/diffusion/lora`, is in PEFT's format.
Source: targets and rank as in PEFT's and diffusers' recipes for Flux; learning rate as there.
"""

from ml_collections import ConfigDict

from configs.diffusion.train import image
from configs.diffusion.train.image import rows


def get_config() -> ConfigDict:
    config = image.get_config()
    config.folder = "outputs/lora"
    config.model.update(cond_embed=True, strict_load=True, remat_policy="full")
    config.model.from_pretrained = "./ckpts/Open_Sora_v2.safetensors"
    config.lora = {
        "rank": 16,
        "alpha": 16.0,
        "targets": (
            "double_blocks.*_attn",
            "single_blocks.*.q_proj",
            "single_blocks.*.k_proj",
            "single_blocks.*.v_mlp",
        ),
        "from_pretrained": None,
    }
    config.encode.motion_score = ""  # a column of your table that has it, if there is one: "score_vmafmotion"
    config.bucket_config = {"256px": rows(1.0, (33, 129, 1))}
    config.preview.sampling_option.num_frames = 33
    config.optim.lr = 1e-4
    config.accumulation_steps = 1
    config.mesh.update(data=-1, fsdp=1)
    config.loop.update(num_steps=2000, ckpt_every=250, keep_n_latest=2)
    return config
