"""Open-Sora 2.0 on images: the first of its stages, from the weights of an image model.

    python -m opensora_jax.dataset encode --config=configs/diffusion/train/image.py
    python -m opensora_jax.train --config=configs/diffusion/train/image.py \\
        --config.model.from_pretrained=ckpts/flux1-dev.safetensors --config.model.layout=flux

The table is `outputs/image/meta.parquet`; `--config.latents=` (empty) trains from the files, without a cache.
Hardware: a pod, such as a v5p-128 (64 chips: 2 x 32 of data and fsdp). Every block recomputes all but attention, and a
step takes its batch in three parts, which fits chips of 32 GB (forecasts in docs/performance.md).
Source: hpcaitech/Open-Sora, `configs/diffusion/train/image.py`: its numbers, but `num_steps` in place of 1000 epochs,
and three parts of 17, 4 and 2 images in place of 50, 11 and 7 at once.
"""

from importlib import import_module

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs.diffusion.train import demo

PROMPTS = (  # of `preview`, as the captions in training end
    "A fishing boat leaves a small harbour at dawn, gulls circling above it. 24 FPS, 4 motion score.",
    "A woman in a yellow coat walks through a crowded night market, steam rising. 24 FPS, 4 motion score.",
    "Rain falls on the leaves of a garden, seen from close by. 24 FPS, 2 motion score.",
    "A drone flies over snow-covered mountains in the evening sun. 24 FPS, 6 motion score.",
)


def rows(keep: float, *sizes: tuple[int, int, int]) -> dict[int, tuple[float, int]]:
    """Returns lines of a bucket_config, one for every fourth number of frames, from (first, last, batch size)."""
    return {frames: (keep, size) for first, last, size in sizes for frames in range(first, last + 1, 4)}


def get_config() -> ConfigDict:
    config = demo.get_config()
    config.folder = "outputs/image"
    config.seed = 42
    config.dtype = "bfloat16"
    published = import_module("configs.diffusion.inference.256px").get_config()
    config.model = published.model
    config.model.update(
        strict_load=False, cond_embed=False, grad_ckpt_settings=(100, 100), remat_policy="save_attention"
    )
    config.model.from_pretrained = placeholder(str)  # to start from: a workdir or a published file
    config.ae, config.t5, config.clip = published.ae, published.t5, published.clip
    config.dataset.update(fps_max=24.0, spatial_unit=16, cache_bytes=0)
    config.encode.update(batch_size=8, posterior="sample", seed=42, fps_suffix=True, motion_score="score_vmafmotion")
    config.bucket_config = {"256px": {1: (1.0, 17)}, "768px": {1: (0.5, 4)}, "1024px": {1: (0.5, 2)}}
    config.accumulation_steps = 3
    config.loader.update(num_workers=12, prefetch=2)
    config.small_buckets = "drop"
    config.flow.update(stratified=False)
    config.flow.flow_shift = placeholder(float)  # follows from the size of the latent
    config.preview.update(prompts=PROMPTS, fps_save=24.0, decode_batch_size=1)
    config.preview.sampling_option = published.sampling_option
    config.preview.sampling_option.num_frames = 1
    config.dropout_ratio.update(t5=0.31622777, clip=0.31622777)
    config.optim.update(cls="adamw", lr=1e-5, betas=(0.9, 0.999), eps=1e-15, warmup_steps=0, lr_schedule="constant")
    config.ema_decay = placeholder(float)
    config.mesh.update(data=-1, fsdp=32)
    config.loop.update(num_steps=100_000, ckpt_every=100, keep_n_latest=20)
    return config
